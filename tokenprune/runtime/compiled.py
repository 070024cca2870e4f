"""Decoding under torch.compile with a static cache: the hooks' work as a few tensor operations that keep no state.

What a step needs was laid down with the prompt's record; nothing here depends on how far the conversation is, so a
step is compiled once, without a break. Whatever else happens under torch.compile (prompts, growing caches, layers that
look back only so far) breaks the graph at the hook and runs as without compilation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from tokenprune.models.decoders import attention_backend
from tokenprune.releases import cache_of
from tokenprune.runtime.caches import has_entries, is_static
from tokenprune.runtime.masks import add_bias, local_attention
from tokenprune.runtime.record import Columns, record_of

# Whether torch.compile looks at what is called from here, though it may not read it. In C, for every hook asks.
is_watched = get_eval_frame_callback


def apart(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that torch.compile is not to look into: the graph ends before it."""
    disabled: Callable[..., Any] = torch.compiler.disable(hook)
    return disabled


def either(hook: Callable[..., Any], quick: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A hook for compiled and for ordinary calls.

    Args:
        hook: for ordinary calls.
        quick: for compiled ones; returns NotImplemented where the hook itself has to run.
    """
    # Not a closure: copying or pickling a wrapped model has to come upon the runtime, which refuses it by name.
    return partial(_choose, hook, quick, apart(hook))


def _choose(
    hook: Callable[..., Any], quick: Callable[..., Any] | None, slow: Callable[..., Any], *given: Any
) -> Any:
    # Nothing else is asked here: torch 2.11 reads `is_exporting()` as True whatever it compiles.
    if not torch.compiler.is_dynamo_compiling():
        # A frame that torch.compile gave up on runs as ever, but what it calls is compiled piece by piece.
        return slow(*given) if is_watched() else hook(*given)
    done = NotImplemented if quick is None else quick(*given)
    return slow(*given) if done is NotImplemented else done


def forget() -> None:
    """Drop what the process has compiled so far, if anything.

    Compiled code does not notice hooks that come and go: what was compiled before `wrap` would run without them, and
    silently wrong on a pruned cache.
    """
    if has_compiled():
        torch.compiler.reset()


def has_compiled() -> bool:
    """Whether anything was compiled in this process so far."""
    return bool(torch._dynamo.utils.counters["frames"]["total"])


class _Eager:
    """While anybody's prompt runs that cannot be compiled whole, what torch.compile made of a module runs as it is.

    A graph that breaks at every hook costs a minute of compiling and saves nothing.
    """

    def __init__(self) -> None:
        # A garbage collection, which ends prompts too, may come while it is held.
        self._lock = threading.RLock()
        self._prompts: set[object] = set()
        self._stance: Any = None

    def begin(self, prompt: object) -> None:
        """A prompt begins; within what is compiled already nothing happens."""
        if is_watched():
            return
        with self._lock:
            self._prompts.add(prompt)
            if self._stance is None:
                self._stance = torch.compiler.set_stance("force_eager")

    def end(self, prompt: object) -> None:
        """It ends, if it had begun."""
        if prompt not in self._prompts:
            return
        with self._lock:
            self._prompts.discard(prompt)
            if not self._prompts and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


eager = _Eager()


def is_step(config: Any, length: int, cache: Any) -> bool:
    """Whether a call is a decoding step that can be compiled whole.

    Args:
        config: of the text model.
        length: columns of the call.
        cache: of the call.
    """
    if length != 1 or not is_static(cache):
        return False
    if record_of(cache) is None:
        return True
    spans = [local_attention(config, i)[1] for i in range(config.num_hidden_layers)]
    fits = all(span is None or cache.layers[i].get_max_length() < span for i, span in enumerate(spans))
    return fits and "flash" not in attention_backend(config)


def positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The text model's inputs of a step, with the positions of a renumbered prompt."""
    record = record_of(cache_of(kwargs))
    ids = kwargs.get("position_ids")
    if record is None or record.shift is None or ids is None:
        return kwargs
    return {**kwargs, "position_ids": ids - record.shift.to(ids.device)}


def mask(i: int, hidden: Tensor, kwargs: dict[str, Any], config: Any) -> dict[str, Any]:
    """Layer i's inputs of a step, with a mask over what its cache holds."""
    cache: Any = cache_of(kwargs)
    record = record_of(cache)
    columns = None if record is None else record.layers[i]
    if columns is None or not has_entries(cache.layers[i]):
        return kwargs
    length = int(cache.layers[i].get_max_length())
    written = torch.arange(length, device=hidden.device) <= torch.as_tensor(
        cache.get_seq_length(i), device=hidden.device
    )
    sees = (written & _real(columns, length, hidden.device))[:, None, None, :]
    if columns.bias is not None:
        sees = add_bias(sees, columns.bias, hidden.dtype)
    elif attention_backend(config) != "sdpa":
        sees = torch.zeros_like(sees, dtype=hidden.dtype).masked_fill(~sees, torch.finfo(hidden.dtype).min)
    return {**kwargs, "attention_mask": sees}


def _real(columns: Columns, length: int, device: torch.device) -> Tensor:
    """(B, length) False at filler and padding."""
    if columns.visible is None:
        return torch.ones(columns.index.shape[0], length, dtype=torch.bool, device=device)
    return torch.nn.functional.pad(columns.visible.to(device), (0, length - columns.length), value=True)


def nothing_in_a_step(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> Any:
    """For hooks that only a prompt needs."""
    states = args[0] if args else kwargs["hidden_states"]
    return None if states.shape[1] == 1 else NotImplemented
