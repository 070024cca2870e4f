"""One call of a wrapped model: what it brings, settled before anything is changed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenprune.config import PruneConfig
from tokenprune.errors import NothingPrunedWarning, TokenPruneError, UnsupportedModeError
from tokenprune.models.base import Family, Image
from tokenprune.runtime.pruning import Pruning, prompt_digests
from tokenprune.runtime.record import Record, attach, is_static, layer_length, read
from tokenprune.runtime.timing import Stopwatch


class Frame:
    """State of one call, in one thread.

    Attributes:
        owner: the module whose call this is.
        batch, length: shape of this call's input.
        past: unpruned columns of the conversation before it.
        record: what the cache's layers held before it, or None when nothing had been pruned.
        attention: (B, past + length) 2D mask as given, or None.
        rows: images by row; empty rows for a text-only prompt; None when this call continues one.
        pruning: the plan, when this call prunes.
    """

    def __init__(self, owner: nn.Module, batch: int, length: int, cache: Any) -> None:
        self.owner, self.batch, self.length, self.cache = owner, batch, length, cache
        self.base_entered = False
        self.past = 0
        self.record: Record | None = None
        self.attention: Tensor | None = None
        self.rows: list[list[Image]] | None = None
        self.pruning: Pruning | None = None
        self.labels: Tensor | None = None
        self.shift: Tensor | None = None
        # Filled in by the layers' hooks.
        self.stage_inputs: dict[str, Any] = {}
        self.masks: dict[tuple[int, int, int], Any] = {}
        self.scoring, self.compacting = Stopwatch(), Stopwatch()

    @property
    def stage(self) -> int:
        """Cuts carried out so far in this call."""
        return 0 if self.pruning is None else len(self.pruning.stages)


def begin(
    model: nn.Module, family: Family, config: PruneConfig, owner: nn.Module, inputs: dict[str, Any]
) -> Frame | None:
    """The frame of a call, or None when the call is none of our business (decode of an unpruned conversation).

    Raises:
        TokenPruneError: the call cannot be pruned exactly; nothing has been changed.
    """
    ids = inputs.get("input_ids")
    reference = ids if ids is not None else inputs.get("inputs_embeds")
    if reference is None:
        return None  # the model's own error says what is missing
    batch, length = reference.shape[:2]
    cache = inputs.get("past_key_values")
    frame = Frame(owner, batch, length, cache)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        frame.attention = mask
    layers = len(family.layers(model))
    visual = family.has_visual(inputs)

    frame.record = record = read(cache, layers, batch)
    if record is not None and is_static(cache) and length > 1 and layer_length(cache, 0) == 0:
        attach(cache, None)  # generate() resets its static cache and uses it again
        frame.record = record = None
    if record is not None:
        frame.past = record.length if is_static(cache) else layer_length(cache, 0) + record.removed(0)
        if record.before_llm:
            _check_continuation(frame, family, inputs, visual)
    elif length > 1 or not is_static(cache):
        frame.past = layer_length(cache, 0)

    if visual and ids is None:
        _nothing_pruned(config, "inputs_embeds came without input_ids, so the visual tokens cannot be located")
    elif visual:
        _plan(frame, model, family, config, ids, inputs)
    elif record is None:
        if frame.past or length == 1:
            return None
        frame.rows = [[] for _ in range(batch)]
    return frame


def _check_continuation(frame: Frame, family: Family, inputs: dict[str, Any], visual: bool) -> None:
    if frame.attention is not None and frame.attention.shape[1] != frame.past + frame.length:
        raise UnsupportedModeError(
            "a further turn after a cut before the LLM is not supported: the cache's length no longer tells which tokens "
            "are new; cut at layer 1 or later, or pass the whole conversation without the cache"
        )
    if visual:
        raise UnsupportedModeError(
            "new images after a cut before the LLM are not supported; cut at layer 1 or later for several turns"
        )
    if inputs.get("position_ids") is None and family.mrope:
        raise UnsupportedModeError("after a cut before the LLM pass position_ids, as generate() does")


def _plan(
    frame: Frame, model: nn.Module, family: Family, config: PruneConfig, ids: Tensor, inputs: dict[str, Any]
) -> None:
    """Settle spans and counts from the call's one device-to-host copy."""
    if model.training and torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
        raise UnsupportedModeError(
            "gradient checkpointing runs layers twice and cannot be combined with pruning; switch it off, or unwrap"
        )
    visible = _visible(frame, inputs.get("attention_mask"))
    host = _to_host([ids, *([] if visible is None else [visible]), *family.host_tensors(inputs)])
    ids_host = host.pop(0)
    mask: NDArray[np.bool_] | None = None
    if visible is not None:
        mask = host.pop(0).astype(bool)
        mask = None if mask.all() else mask
    frame.rows = rows = family.images(model, ids_host, inputs, host)
    if not any(rows) or not config.cuts:
        return
    text: Any = family.text_model(model).config
    pruning = Pruning(rows, config, len(family.layers(model)), ids_host, mask)
    if not pruning.prunes:
        if _asked(config, rows):
            _nothing_pruned(config, "the budget rounds to all tokens of every image")
        return
    _check_window(frame, text)
    pruning.num_heads = text.num_attention_heads
    pruning.padding = visible if mask is not None else None
    if config.method.needs().digest and config.keep_lists is None:
        pruning.digests = prompt_digests(ids, mask, rows, family.pixel_digests(inputs, rows))
    frame.pruning = pruning


def _asked(config: PruneConfig, rows: list[list[Image]]) -> bool:
    keep = config.keep if config.keep is not None else config.cuts[-1].keep
    if keep is None:  # forced lists
        return False
    return any(keep < 1 if isinstance(keep, float) else keep < image.n for row in rows for image in row)


def _nothing_pruned(config: PruneConfig, reason: str) -> None:
    if not config.cuts:
        return
    if config.strict:
        raise TokenPruneError(f"nothing would be pruned: {reason}")
    warnings.warn(f"nothing was pruned: {reason}", NothingPrunedWarning, stacklevel=2)


def _visible(frame: Frame, mask: Any) -> Tensor | None:
    """(B, L) True at real tokens of this call's input; None where no padding mask is known."""
    if frame.attention is not None:
        return frame.attention[:, -frame.length :] != 0
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if isinstance(mask, Tensor) and mask.ndim == 4 and is_static(frame.cache):
        # generate() prepares 4D masks for static caches; the last row of a causal mask is the padding.
        last = mask[:, 0, -1, frame.past : frame.past + frame.length]
        last = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        return last.expand(frame.batch, -1)
    return None


def _check_window(frame: Frame, text: Any) -> None:
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    slides = window is not None and (types is None or "sliding_attention" in types)
    if slides and frame.past + frame.length > window:
        raise UnsupportedModeError(
            f"the prompt ({frame.past + frame.length} tokens) is longer than the model's sliding window ({window}); "
            f"pruning is exact only within it"
        )


def _to_host(tensors: list[Tensor]) -> list[NDArray[np.int64]]:
    """Copy integer tensors to the host in one transfer."""
    device = tensors[0].device
    flat = torch.cat([t.reshape(-1).to(device, torch.int64) for t in tensors]).cpu().numpy()
    ends = np.cumsum([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(np.split(flat, ends[:-1]), tensors, strict=True)]
