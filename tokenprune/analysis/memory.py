"""What many runs over the same prompts would compute again: vision features, and the unpruned model's last state."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.api import family_of, is_wrapped, override, runtime_of
from tokenprune.errors import ConfigError
from tokenprune.fingerprint import stamp
from tokenprune.models import stock_model
from tokenprune.models.base import VisionCall
from tokenprune.runtime.tower import TowerTap


@dataclass(frozen=True)
class LastState:
    """What a prompt ends in; on the CPU, float32.

    Attributes:
        state: (B, D) the last position's state after the final norm.
        logits: (B, V) of the next token.
    """

    state: Tensor
    logits: Tensor


class Memory:
    """Remembers by content: another picture, prompt, weight, dtype or config is computed anew.

    Args:
        most_bytes: beyond it, what was used longest ago lies in memory-mapped files, which go with this object.
    """

    def __init__(self, most_bytes: int = 2**31) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.hits = self.misses = 0
        self._held: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @contextmanager
    def features(self, model: Any) -> Iterator[None]:
        """Inside, the vision tower computes once per pictures.

        Pruning in the decoder cannot change what the tower returns, so answers are the same to the bit. What a method
        wants of the tower's attention is made of the states that were caught the first time it was looked into. Only
        the tower's `forward` is replaced: hooks on the tower still run, those inside it only when it computes.

        The tower's weights are looked at once, on entry: what is timed inside is not to pay for them.
        """
        inner = stock_model(model)
        tower: Any = family_of(model).vision_tower()
        if "forward" in vars(tower):
            raise ConfigError("the vision tower's forward is replaced already; use one memory at a time")
        original, weights, seen = tower.forward, stamp(tower), _LastSeen()

        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = f"features {weights} {torch.is_autocast_enabled()} {seen.digest([args, kwargs])}"
            looks, looked = _looks_inside(inner), f"{key} attention"
            output, caught = self._look_up(key, looked if looks else None)
            if output is None:
                output = original(*args, **kwargs)
                self._keep(key, output)
                if looks is not None:
                    self._keep(looked, looks.caught)
            elif looks is not None:
                looks.replay(caught)
            return copy.copy(output)  # what is noted on an output is of its own call

        tower.forward = remembered
        try:
            yield
        finally:
            del tower.forward

    def reference(self, model: Any, inputs: Mapping[str, Any]) -> LastState:
        """What the unpruned model makes of a prompt; of a wrapped one, with method "none".

        Args:
            model: stock or wrapped.
            inputs: of the model, padded on the left if at all.

        Raises:
            ConfigError: padding on the right.
        """
        inner = stock_model(model)
        key = content_digest("reference", stamp(inner), torch.is_autocast_enabled(), dict(inputs))
        found, _ = self._look_up(key)
        if found is None:
            with override(model, method="none") if is_wrapped(model) else nullcontext():
                found = last_state(inner, inputs)
            self._keep(key, found)
        assert isinstance(found, LastState)
        return found

    def _look_up(self, key: str, beside: str | None = None) -> tuple[Any, Any]:
        """What is held under a key, and under another that is needed beside it; nothing where either is missing."""
        keys = [key] if beside is None else [key, beside]
        if any(name not in self._held for name in keys):
            self.misses += 1
            return None, None
        self.hits += 1
        found = []
        for name in keys:
            self._held.move_to_end(name)
            found.append(_each_tensor(self._held[name][0], _back))
        return found[0], found[-1]

    def _keep(self, key: str, value: Any) -> None:
        if key in self._held:
            self.bytes -= self._held.pop(key)[1]
        size = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.nbytes
            return tensor

        _each_tensor(value, count)
        self._held[key] = value, size
        self.bytes += size
        for name, (own, held) in self._held.items():  # the oldest first
            if self.bytes <= self.most_bytes or name == key:
                break
            if held:
                self._held[name] = _each_tensor(own, self._map), 0
                self.bytes -= held

    def _map(self, tensor: Tensor) -> Tensor | _Mapped:
        """A tensor's values in a file of its own."""
        if not tensor.numel():
            return tensor
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tokenprune-")
        handle, path = tempfile.mkstemp(dir=self._folder.name)
        os.close(handle)
        flat = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        flat.copy_(tensor.detach().flatten())
        return _Mapped(flat.view(tensor.shape), tensor.device)


@dataclass(frozen=True)
class _Mapped:
    """A tensor in a memory-mapped file, and the device it came from."""

    tensor: Tensor
    device: torch.device


def _back(held: Tensor | _Mapped) -> Tensor:
    return held.tensor.to(held.device) if isinstance(held, _Mapped) else held


def _each_tensor(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same with other tensors, whatever of ours or of transformers' holds them."""
    if isinstance(value, Tensor | _Mapped):
        return change(value)
    if isinstance(value, LastState | VisionCall):
        return replace(value, **{name: _each_tensor(own, change) for name, own in vars(value).items()})
    if isinstance(value, MutableMapping):  # transformers' outputs too
        same = copy.copy(value)
        for name, own in value.items():
            same[name] = _each_tensor(own, change)
        return same
    if isinstance(value, list | tuple):
        return type(value)(_each_tensor(own, change) for own in value)
    return value


def last_state(model: Any, inputs: Mapping[str, Any]) -> LastState:
    """Run a prompt through the model as it is, pruned or not, and take its last position.

    Raises:
        ConfigError: padding on the right: the last column is not the prompt's end.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all()):
        raise ConfigError("pad prompts on the left: the last column has to be their end")
    inner: Any = stock_model(model)
    seen: list[Tensor] = []
    norm = family_of(model).final_norm()
    handle = norm.register_forward_hook(lambda _module, _args, output: seen.append(output[:, -1]))
    try:
        with torch.inference_mode():
            logits = inner(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    finally:
        handle.remove()
    return LastState(seen[-1].float().cpu(), logits.float().cpu())


def _looks_inside(model: Any) -> TowerTap | None:
    """Where the tower's attention is caught, if the method of the call under way, or to come, asks."""
    runtime = runtime_of(model)
    if runtime is None:
        return None
    call = runtime.calls.running()
    config = runtime.settings if call is None else call.config
    if not config.scores or config.needs.vision is None:
        return None
    return runtime.tower


class _LastSeen:
    """The digest of what a tower was given last: the very same tensors, not written to since, are not read again."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, int]] = []
        self._rest = self._digest = ""

    def digest(self, given: Any) -> str:
        tensors: list[Tensor] = []
        rest = repr(_without_tensors(given, tensors))
        versions = [-1 if t.is_inference() else t._version for t in tensors]
        same = rest == self._rest and len(tensors) == len(self._tensors) and -1 not in versions
        now = list(zip(tensors, versions, strict=True))
        if not same or any(a is not b or v != w for (a, v), (b, w) in zip(now, self._tensors, strict=True)):
            self._digest = content_digest(given)
        self._tensors, self._rest = now, rest
        return self._digest


def _without_tensors(part: Any, tensors: list[Tensor]) -> Any:
    """The same with numbers in their place; they are put into `tensors`."""
    if isinstance(part, Tensor):
        tensors.append(part)
        return len(tensors)
    if isinstance(part, Mapping):
        return {name: _without_tensors(own, tensors) for name, own in part.items()}
    if isinstance(part, list | tuple):
        return [_without_tensors(own, tensors) for own in part]
    return part


def content_digest(*parts: Any) -> str:
    """64 hex digits of what is in tensors, mappings and sequences; of anything else, of its repr."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)} {part.dtype} {part.device}".encode())
            digest.update(part.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for name in sorted(part):
                digest.update(f"{name}=".encode())
                add(part[name])
        elif isinstance(part, list | tuple):
            digest.update(f"[{len(part)}".encode())
            for own in part:
                add(own)
        else:
            digest.update(repr(part).encode())

    add(parts)
    return digest.hexdigest()
