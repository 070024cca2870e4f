"""The bare facts of one prompt, as the runtime leaves them for the report."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokenprune.budget import average_kept
from tokenprune.config import PruneConfig
from tokenprune.runtime.call import Call
from tokenprune.runtime.flops import LayerCost, prefill_flops
from tokenprune.runtime.plan import Key
from tokenprune.runtime.record import record_of
from tokenprune.runtime.timing import Stopwatch
from tokenprune.tensors import plain_tensors
from tokenprune.tokens import Image


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    config: the configuration that ran.
    rows: images by row.
    pooled: whether `counts` and `kept` are of each row's images together.
    counts: per cut, tokens each (row, image) kept.
    kept: per cut, raster indices each (row, image) kept (device tensors).
    merged: per cut, (pairs, weights) by raster index where tokens were merged.
    biased: per cut, (raster indices, values) of the biases that methods gave.
    notes: what was told of each (row, image), by the runtime and by the method at each cut; see `Selection.notes`.
    index: (B, L') columns left at the end, -1 filler; None when nothing was cut.
    length: columns of the input.
    lengths: columns entering each decoder layer.
    kv_used, kv_allocated: bytes of each layer's keys and values, right after the prompt.
    batch: rows.
    costs: of the decoder layers.
    reason: why nothing was pruned although the budget asked for it.
    flops_ahead: of layers that ran on images alone; see `Needs.ahead`.
    """

    config: PruneConfig
    rows: list[list[Image]]
    pooled: bool
    counts: list[dict[Key, int]]
    kept: list[dict[Key, Tensor]]
    merged: list[dict[Key, tuple[Tensor, Tensor]]]
    biased: list[dict[Key, tuple[Tensor, Tensor]]]
    notes: dict[Key, list[Mapping[str, int | Tensor]]]
    index: Tensor | None
    length: int
    lengths: list[int]
    kv_used: list[int]
    kv_allocated: list[int]
    batch: int
    costs: Sequence[LayerCost]
    scoring: Stopwatch
    compacting: Stopwatch
    reason: str | None = None
    flops_ahead: int = 0

    @property
    def flops(self) -> int:
        """Of the decoder's prefill, all rows, what was looked ahead at included."""
        return self.batch * prefill_flops(self.costs, self.lengths) + self.flops_ahead

    @property
    def flops_unpruned(self) -> int:
        return self.batch * prefill_flops(self.costs, [self.length] * len(self.lengths))


class Total:
    """Sums over the prompts of a model, of whatever thread."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self._gate:
            self.prompts = self.rows = self.images = self.tokens = self.kept = 0
            self.averages = 0.0  # mean over layers of each image's tokens, summed up
            self.kv_used = self.kv_allocated = self.flops = self.flops_unpruned = 0
            self._watches: list[tuple[Stopwatch, Stopwatch]] = []
            self._seconds = [0.0, 0.0]

    def add(self, outcome: Outcome) -> None:
        """Add a prompt; nothing waits for the device."""
        layers = len(outcome.lengths)
        with self._gate:
            self.prompts += 1
            self.rows += outcome.batch
            for r, row in enumerate(outcome.rows):
                self.images += len(row)
                self.tokens += sum(image.n for image in row)
                budgets = [row] if outcome.pooled and row else [[image] for image in row]
                for i, own in enumerate(budgets):
                    n = sum(image.n for image in own)
                    counts = [cut[r, i] for cut in outcome.counts]
                    self.kept += counts[-1] if counts else n
                    self.averages += average_kept(n, layers, outcome.config.cuts, counts) if counts else n
            self.kv_used += sum(outcome.kv_used)
            self.kv_allocated += sum(outcome.kv_allocated)
            self.flops += outcome.flops
            self.flops_unpruned += outcome.flops_unpruned
            self._watches.append((outcome.scoring, outcome.compacting))
            if len(self._watches) > 256:  # those of long ago have stopped
                self._read(self._watches[:128])
                del self._watches[:128]

    def seconds(self) -> tuple[float, float]:
        """Spent on scoring and on compacting."""
        with self._gate:
            self._read(self._watches)
            self._watches.clear()
            return self._seconds[0], self._seconds[1]

    def _read(self, watches: list[tuple[Stopwatch, Stopwatch]]) -> None:
        for scoring, compacting in watches:
            self._seconds[0] += scoring.seconds
            self._seconds[1] += compacting.seconds


def make_outcome(costs: Sequence[LayerCost], call: Call) -> Outcome:
    num_layers = len(costs)
    stages, config = call.stages, call.config
    lengths = [call.length] * num_layers
    if stages is not None:
        lengths = [stages.plan.lengths[c - 1] if c else call.length for c in config.cuts_by(num_layers)]
    held: list[int] = []
    if call.kv.spans_more:
        record, total = record_of(call.cache), call.past + call.length
        held = [total - (0 if record is None else record.removed(i)) for i in range(num_layers)]
    used, allocated = kv_bytes(call.cache, held)
    assert call.rows is not None
    return Outcome(
        config=config,
        rows=call.rows,
        pooled=stages is not None and stages.plan.pooled,
        counts=[] if stages is None else stages.plan.counts,
        kept=[] if stages is None else stages.kept,
        merged=[] if stages is None else stages.merged,
        biased=[] if stages is None else stages.biased,
        notes=call.notes if stages is None else stages.notes,
        index=None if stages is None else stages.done[-1].index,
        length=call.length,
        lengths=lengths,
        kv_used=used,
        kv_allocated=allocated,
        batch=call.batch,
        costs=costs,
        scoring=call.scoring,
        compacting=call.compacting,
        reason=call.reason,
        flops_ahead=call.flops_ahead,
    )


_PAIRS = ("keys", "values", "_quantized_keys", "_quantized_values")


def kv_bytes(cache: Any, static_lengths: list[int]) -> tuple[list[int], list[int]]:
    """Used and allocated bytes of each layer of a cache, read off its own tensors.

    A storage that several layers share, as compaction on a GPU makes it, counts once, in the first of them.

    Args:
        cache: a transformers cache, or None.
        static_lengths: used entries per layer, where tensors are allocated ahead.
    """
    used: list[int] = []
    allocated: list[int] = []
    counted: set[int] = set()
    for i, layer in enumerate(getattr(cache, "layers", None) or []):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        quantised = hasattr(layer, "_quantized_keys")
        if type(layer) is DynamicLayer and type(keys) is type(values) is Tensor and not quantised:
            tensors = [keys, values]  # the usual kind, in as few calls as can be
        else:
            # A quantised layer holds most of its entries in the second pair.
            names = _PAIRS if quantised else _PAIRS[:2]
            tensors = [t for name in names for t in plain_tensors(getattr(layer, name, None)) if t.numel()]
        total = own = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            total += tensor.nbytes
            if place not in counted:
                counted.add(place)
                own += storage.nbytes()
        if tensors and getattr(layer, "is_compileable", False):
            entries = tensors[0].shape[-2]
            total = total // entries * min(static_lengths[i], entries)
        used.append(total)
        allocated.append(own)
    return used, allocated
