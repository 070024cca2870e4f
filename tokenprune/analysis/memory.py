"""What many runs over the same prompts would compute again: vision features, and the unpruned model's last state."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.api import family_of, is_wrapped, override, runtime_of
from tokenprune.errors import ConfigError
from tokenprune.fingerprint import stamp
from tokenprune.models import stock_model
from tokenprune.tensors import plain_tensors


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
        most_bytes: beyond it, what was used longest ago is forgotten.
    """

    def __init__(self, most_bytes: int = 2**31) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.hits = self.misses = 0
        self._held: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    @contextmanager
    def features(self, model: Any) -> Iterator[None]:
        """Inside, the vision tower computes once per pictures.

        Pruning in the decoder cannot change what the tower returns, so answers are the same to the bit. A method that
        looks into the tower has it computed every time. Only the tower's `forward` is replaced: hooks on the tower
        still run, those inside it only when it computes.
        """
        inner = stock_model(model)
        tower: Any = family_of(model).vision_tower(inner)
        if "forward" in vars(tower):
            raise ConfigError("the vision tower's forward is replaced already; use one memory at a time")
        original = tower.forward

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if _looks_inside(inner):
                return original(*args, **kwargs)
            key = content_digest("features", stamp(tower), torch.is_autocast_enabled(), args, kwargs)
            found = self._look_up(key)
            if found is None:
                found = original(*args, **kwargs)
                self._keep(key, found)
            return copy.copy(found)  # what is noted on an output is of its own call

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
        found = self._look_up(key)
        if found is None:
            with override(model, method="none") if is_wrapped(model) else nullcontext():
                found = last_state(inner, inputs)
            self._keep(key, found)
        assert isinstance(found, LastState)
        return found

    def _look_up(self, key: str) -> Any:
        found = self._held.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._held.move_to_end(key)
        return found[0]

    def _keep(self, key: str, value: Any) -> None:
        held = vars(value) if isinstance(value, LastState) else value
        size = sum(t.nbytes for t in plain_tensors(held))
        self._held[key] = value, size
        self.bytes += size
        while self.bytes > self.most_bytes and len(self._held) > 1:
            _, (_, gone) = self._held.popitem(last=False)
            self.bytes -= gone


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
    norm = family_of(model).final_norm(inner)
    handle = norm.register_forward_hook(lambda _module, _args, output: seen.append(output[:, -1]))
    try:
        with torch.inference_mode():
            logits = inner(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    finally:
        handle.remove()
    return LastState(seen[-1].float().cpu(), logits.float().cpu())


def _looks_inside(model: Any) -> bool:
    """Whether the method of the call under way, or to come, wants the tower's attention."""
    runtime = runtime_of(model)
    if runtime is None:
        return False
    config = runtime.settings if runtime.call is None else runtime.call.config
    return config.needs.vision is not None


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
