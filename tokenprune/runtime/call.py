"""One call of a wrapped model: what it brings, settled before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.config import PruneConfig
from tokenprune.errors import NothingPrunedWarning, TokenPruneError, UnsupportedModeError
from tokenprune.models.base import Family
from tokenprune.models.decoders import attention_backend, takes_biases
from tokenprune.releases import cache_of, release, repeats_hooks
from tokenprune.runtime.caches import CacheView, check_is_cache, crop, view_of
from tokenprune.runtime.layer_states import LayerStates
from tokenprune.runtime.masks import local_attention
from tokenprune.runtime.plan import Key, make_plan
from tokenprune.runtime.record import Record
from tokenprune.runtime.rows import read
from tokenprune.runtime.sight import Sight, prompt_digests
from tokenprune.runtime.stages import Stages
from tokenprune.runtime.timing import Stopwatch
from tokenprune.runtime.vision import VisionFacts, check_facts, visual_inputs
from tokenprune.tensors import to_host
from tokenprune.tokens import Image, IntArray


class Call:
    """State of one call, in one thread.

    Attributes:
        config: what this call is asked.
        batch, length: shape of this call's input.
        past: unpruned columns of the conversation before it.
        record: what the cache's layers held before it, or None when nothing had been pruned.
        attention: (B, past + length) 2D mask as given, or None.
        blocks: see `Family.blocks`.
        visible: (B, past + length) bool, False at padding; None where there is none. Known when the call prunes.
        rows: images by row; empty rows for a text-only prompt; None when this call continues one.
        stages, sight: what is left, and what the method is shown of it, when this call prunes.
        reason: why nothing is pruned although the budget asks for it.
        notes: what was told of its images while nothing is pruned; see `Selection.notes`.
        kinds, facts: the kinds of visual input it brings, and what the vision tower's hook noted of them.
        sizes: of its images and videos, as given and on the host.
    """

    def __init__(self, config: PruneConfig, batch: int, length: int, view: CacheView) -> None:
        self.config, self.batch, self.length = config, batch, length
        self.cache, self.kv = view.cache, view
        self.positions_given = False
        self.past = 0
        self.record: Record | None = None
        self.attention: Tensor | None = None
        self.blocks: Tensor | None = None
        self.visible: Tensor | None = None
        self.rows: list[list[Image]] | None = None
        self.stages: Stages | None = None
        self.sight: Sight | None = None
        self.kinds: tuple[str, ...] = ()
        self.facts: dict[str, VisionFacts] = {}
        self.sizes: list[tuple[Tensor, IntArray]] = []
        self.given: dict[str, Any] | None = None  # what a prompt that is tried brings; see `trial.py`
        self.again: dict[str, Any] | None = None  # what one brings that may be done again; see `escalate.py`
        self.labels: Tensor | None = None
        self.loss_options: dict[str, Any] = {}
        self.shift: Tensor | None = None
        self.deltas: Tensor | None = None  # the model's own when the call began; see `deltas.py`
        self.reason: str | None = None
        self.notes: dict[Key, list[Mapping[str, int | Tensor]]] = {}
        self.is_plain = False  # whether its layers need nothing: no cut, and no masks but the model's
        # What layers behind the last cut are given instead of their own, by what it was made of.
        self.changes: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.step_masks: list[Any] | None = None  # by layer, of a decoding step; see `LayerMasks.of_step`
        self.positions: dict[tuple[int, int], dict[str, Any]] = {}
        self.masks: dict[tuple[int, int, int, str], Any] = {}
        self.features: dict[int, Tensor] = {}  # (B, L', D) still to be added to the output of these layers
        self.scoring, self.compacting = Stopwatch(), Stopwatch()
        self.flops_ahead = 0  # of layers that ran on images alone
        self.caught: LayerStates | None = None  # by the taps, until whoever wants them has all there are

    def use(self, cache: Any) -> None:
        """The cache this call fills: the text model may make it only now."""
        if cache is not self.cache:
            self.cache, self.kv = cache, view_of(cache)

    @property
    def cuts_done(self) -> int:
        """Cuts carried out so far in this call."""
        return 0 if self.stages is None else len(self.stages.done)


def open_call(family: Family, config: PruneConfig, inputs: dict[str, Any], span: float) -> Call | None:
    """The state of a call, or None when it is none of our business (decode of an unpruned conversation).

    Args:
        family, config: of the runtime.
        inputs: of the call, by name.
        span: columns up to which every layer sees all there are.

    Raises:
        TokenPruneError: the call cannot be pruned exactly; nothing has been changed.
    """
    ids = inputs.get("input_ids")
    reference = ids if ids is not None else inputs.get("inputs_embeds")
    if reference is None:
        return None  # the model's own error says what is missing
    batch, length = reference.shape[:2]
    sizes, facts = visual_inputs(family, inputs)
    visual = bool(sizes)
    cache = cache_of(inputs)
    check_is_cache(cache)
    view = view_of(cache)
    record = read(view, len(family.layers()), batch, length)
    past = view.past(record, length)
    if record is None and not visual and view.is_step(past, length):
        return None

    call = Call(config, batch, length, view)
    call.record, call.past = record, past
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        call.attention = mask
    call.positions_given = inputs.get("position_ids") is not None
    if record is not None:
        if record.first_is_short:
            _check_continuation(call, family, inputs, visual)
        if past + length > span:
            _check_window(call, family.text_model().config)
    if ids is None and (visual or (record is None and not past and length > 1)):
        _nothing_pruned(
            call, config, "inputs_embeds came without input_ids, so the visual tokens cannot be located"
        )
        call.rows = [[] for _ in range(batch)]
    elif visual:
        call.kinds, call.facts = tuple(sizes), facts
        _plan(call, family, config, reference, inputs, sizes)
    elif record is None:
        call.rows = [[] for _ in range(batch)]
    return call


def _check_continuation(call: Call, family: Family, inputs: dict[str, Any], visual: bool) -> None:
    """After a cut before the first layer that attends no cache's length tells the conversation's: ask the inputs."""
    record, position_ids = call.record, inputs.get("position_ids")
    assert record is not None
    # To generate() a cut below the first layer that attends is one before the LLM.
    later = f"cut at layer {record.first + 1} or later"
    if visual:
        raise UnsupportedModeError(
            f"new images after a cut before the LLM are not supported; {later} for several turns"
        )
    if position_ids is None and family.mrope:
        raise UnsupportedModeError("after a cut before the LLM pass position_ids, as generate() does")
    past = call.past
    if call.attention is not None:
        past = call.attention.shape[1] - call.length
    elif position_ids is not None and not call.kv.spans_more and (call.length > 1 or record.verify):
        # Without a mask there is no padding: the last position is the last column. (One copy from the device, for
        # continuations of several tokens only, and the step after one.)
        position = position_ids[0] if position_ids.ndim == 3 else position_ids
        past = int(position[0, -1]) + 1 - family.first_position - call.length
    record.verify = call.length > 1
    if past < record.settled or past > call.past:
        raise UnsupportedModeError(
            f"a further turn after a cut before the LLM is not supported: the cache's length no longer tells which "
            f"tokens are new; {later}, or pass the whole conversation without the cache"
        )
    if past < call.past:
        crop(call.cache, record, past)
        call.past = past
    if past < record.length:
        record.cut_to(past)


def _plan(
    call: Call,
    family: Family,
    config: PruneConfig,
    ids: Tensor,
    inputs: dict[str, Any],
    sizes: dict[str, Tensor],
) -> None:
    """Settle spans and counts from the call's one device-to-host copy."""
    family.check_call(inputs)
    call.blocks = family.blocks(inputs, call.past + call.length) if call.past else None
    visible = _visible(call, inputs.get("attention_mask"))
    host = to_host([ids, *([] if visible is None else [visible]), *sizes.values()])
    ids_host = host.pop(0)
    mask: NDArray[np.bool_] | None = None
    if visible is not None:
        whole = host.pop(0).astype(bool)
        mask = None if whole[:, call.past :].all() else whole[:, call.past :]
        call.visible = None if whole.all() else visible
        visible = visible[:, call.past :]
    call.sizes = list(zip(sizes.values(), host, strict=True))
    encoded = set(inputs.get("mm_encoder_outputs") or {})
    rows: list[list[Image]] = [[] for _ in ids_host]
    for kind, own in zip(sizes, host, strict=True):
        for row, images in zip(rows, _images(family, kind, ids_host, own, kind in encoded), strict=True):
            row.extend(images)
    for row in rows:
        row.sort(key=lambda image: int(image.columns[0]))
    call.rows = rows
    if not any(rows) or not config.cuts:
        return
    text: Any = family.text_model().config
    if config.scores:
        check_facts(call.facts, config)
    plan = make_plan(rows, config, call.length, mask, len(family.layers()))
    if not plan.prunes:
        call.notes = {key: [own] for key, own in plan.notes.items()}
        if _asked(config, rows):
            _nothing_pruned(call, config, "the budget rounds to all tokens of every image")
        return
    if family.model.training and torch.is_grad_enabled() and repeats_hooks(family.model):
        raise UnsupportedModeError(
            f"gradient checkpointing in {release()} runs layers and their hooks twice, and cannot be combined with "
            f"pruning; switch it off, unwrap, or install transformers 5.23 or later"
        )
    _check_window(call, text)
    if config.needs.bias and not takes_biases(text):
        raise UnsupportedModeError(
            f"method {config.method.name!r} adds biases to attention, which {attention_backend(text)} does not take; "
            f"switch to sdpa or eager"
        )
    wants_digest = config.needs.digest and config.arguments.keep_lists is None
    prompts = prompt_digests(ids, mask, plan.rows) if wants_digest else {}
    call.stages = Stages(plan, visible if mask is not None else None)
    call.sight = Sight(family, config, text.num_attention_heads, call.facts, prompts)


def _images(family: Family, kind: str, ids: IntArray, sizes: IntArray, encoded: bool) -> list[list[Image]]:
    layouts = family.layouts(kind, sizes)
    times = 1
    if encoded and layouts:
        # Beams: generate() encodes an image once and repeats each row's features; what was noted is not repeated.
        given = int((ids == family.token_id(kind)).sum())
        times = max(1, given // max(1, sum(layout.columns for layout in layouts)))
    found = family.images(kind, ids[::times], layouts)
    return [found[r // times] for r in range(len(ids))]


def _asked(config: PruneConfig, rows: list[list[Image]]) -> bool:
    keep = config.arguments.keep if config.arguments.keep is not None else config.cuts[-1].keep
    if keep is None:  # forced lists
        return False
    return any(keep < 1 if isinstance(keep, float) else keep < image.n for row in rows for image in row)


def _nothing_pruned(call: Call, config: PruneConfig, reason: str) -> None:
    if not config.cuts:
        return
    call.reason = reason
    if config.arguments.strict:
        raise TokenPruneError(f"nothing would be pruned: {reason}")
    warnings.warn(f"nothing was pruned: {reason}", NothingPrunedWarning, stacklevel=2)


def _visible(call: Call, mask: Any) -> Tensor | None:
    """(B, past + L) True at real tokens; None where no padding mask is known."""
    if call.attention is not None:
        known = call.attention[:, -(call.past + call.length) :] != 0
        return torch.nn.functional.pad(known, (call.past + call.length - known.shape[1], 0), value=True)
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if isinstance(mask, Tensor) and mask.ndim == 4 and call.kv.spans_more:
        # generate() prepares 4D masks for static caches; what no row sees, not even its own, is padding.
        mask = mask[:, 0, :, : call.past + call.length]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return mask.any(1).expand(call.batch, -1)
    return None


def _check_window(call: Call, text: Any) -> None:
    """Flash attention is given no mask that could say where a pruned token's window ends."""
    if "flash" not in attention_backend(text):
        return
    for i in range(text.num_hidden_layers):
        kind, span = local_attention(text, i)
        if span is not None and call.past + call.length > span:
            raise UnsupportedModeError(
                f"the conversation ({call.past + call.length} tokens) is longer than the span of the model's "
                f"{kind} layers ({span}), which flash attention cannot keep exact in a pruned prompt; load the model "
                f"with attn_implementation='sdpa', or unwrap"
            )
