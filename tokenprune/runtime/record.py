"""What a cache's layers hold after pruning. The record travels with the cache object, never with the model."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_tokenprune_record"


@dataclass
class Columns:
    """The entries of one layer's cache.

    Attributes:
        index: (B, C) column of the unpruned conversation each entry came from, -1 for filler.
        visible: (B, C) bool, False at filler and padding; None when every entry is visible.
        bias: (B, C) float32 added to the attention logits of each; None where nothing is.
    """

    index: Tensor
    visible: Tensor | None
    bias: Tensor | None = None
    _prefix: Tensor | None = field(default=None, repr=False, compare=False)

    def prefix(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, C) what every later step's mask begins with: bool, or added to attention logits in that dtype."""
        if self._prefix is None or self._prefix.dtype != dtype:
            made = self.visible
            if made is None:
                made = torch.ones(self.index.shape, dtype=torch.bool, device=self.index.device)
            if dtype != torch.bool:
                # As `masks.add_bias` has it.
                made = self.biases(made.device).to(dtype).masked_fill(~made, torch.finfo(dtype).min)
            self._prefix = made[:, None, None, :]
        return self._prefix

    @property
    def length(self) -> int:
        return int(self.index.shape[1])

    def biases(self, device: torch.device) -> Tensor:
        """(B, C) `bias`, 0 where there is none."""
        return torch.zeros(self.index.shape, device=device) if self.bias is None else self.bias.to(device)


@dataclass(frozen=True)
class Marks:
    """By what rows are told apart: the largest of each row's first head's keys, exact whatever the rows' order.

    Attributes:
        entries: over how many of a layer's first entries.
        values: (B, head_dim).
    """

    entries: int
    values: Tensor


@dataclass
class Rows:
    """By what the rows of a cache are known again, should it be reordered, repeated or taken apart between calls.

    Attributes:
        layer: a layer that holds all it was given.
        marks: over all of the prompt's entries, which tell rows apart as prompts are, and over those up to its last
            image, which are there after a crop, too. None where no layer can tell.
        seen: the tensor the layer's keys were in after the last call. While they are, nothing was moved.
        first: the same of the first layer's, which a call that fails half way has written to.
    """

    layer: int
    marks: tuple[Marks, ...]
    seen: weakref.ref[Tensor] | None
    first: weakref.ref[Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None, "first": None}  # what is read from a file has other tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        """In a copy of the whole cache the rows stand in the copies of its tensors, which are made first."""
        keys = None if self.seen is None else self.seen()
        copied = None if keys is None else memo.get(id(keys))
        return Rows(
            self.layer, copy.deepcopy(self.marks, memo), None if copied is None else weakref.ref(copied)
        )


@dataclass
class Record:
    """Which columns of a conversation each layer's cache still holds.

    Attributes:
        length: columns of the unpruned conversation that are described; later ones are all present.
        settled: columns up to the last one that was pruned; behind them every layer holds every column.
        layers: one entry per decoder layer; None means the layer holds every column.
        padding: (B,) columns of padding before each row's first token, or None where there is none.
        shift: (B, 1) positions to take off after a cut with `positions="compact"`, or None.
        deltas: (B, 1) what its positions are off its columns, where positions have several axes, and the model's own
            tensor that said so; see `deltas.py`.
    """

    length: int
    settled: int
    layers: list[Columns | None]
    first: int = 0  # the first layer that attends: by its length the model knows the conversation's
    padding: Tensor | None = None
    shift: Tensor | None = None
    deltas: tuple[Tensor, Tensor] | None = None
    after: int = 0  # columns added since to a static cache, whose own length only the device knows
    compiled: bool = False  # whether torch.compile may have run steps that `after` does not count
    unfinished: bool = False  # whether a call is writing into the cache; after an interrupt it stays so
    verify: bool = False  # whether the last continuation may have been cropped since
    rows: Rows | None = None

    @property
    def batch(self) -> int:
        return int(next(own for own in reversed(self.layers) if own is not None).index.shape[0])

    def cut_to(self, past: int) -> None:
        """Forget the last columns described: the cache was cropped to `past` columns, none of them pruned since."""
        gone = self.length - past
        seen: dict[int, Columns] = {}
        for i, columns in enumerate(self.layers):
            if columns is not None and id(columns) not in seen:
                visible = None if columns.visible is None else columns.visible[:, :-gone]
                bias = None if columns.bias is None else columns.bias[:, :-gone]
                seen[id(columns)] = Columns(columns.index[:, :-gone], visible, bias)
            self.layers[i] = None if columns is None else seen[id(columns)]
        self.length = past

    def removed(self, layer: int) -> int:
        columns = self.layers[layer]
        return 0 if columns is None else self.length - columns.length

    @property
    def first_is_short(self) -> bool:
        """Whether even the first layer holds fewer entries than the conversation has columns: no length tells it."""
        return self.layers[self.first] is not None


def begin_writing(cache: Any, record: Record | None, layers: int, prunes: bool) -> None:
    """Mark a cache while a call writes into it that no length of it would tell about, should it be interrupted.

    Args:
        cache: of the call.
        record: its own, None when nothing had been pruned.
        layers: of the decoder.
        prunes: whether the call prunes: the record that it will leave is not there yet.
    """
    if prunes:
        record = Record(0, 0, [None] * layers) if record is None else replace(record)
        attach(cache, record)
    if record is not None:
        record.unfinished = True


def record_of(cache: Any) -> Record | None:
    return getattr(cache, _ATTRIBUTE, None)


def attach(cache: Any, record: Record | None) -> None:
    if record is None:
        cache.__dict__.pop(_ATTRIBUTE, None)
    else:
        setattr(cache, _ATTRIBUTE, record)


def extend(
    past: Record | None,
    past_length: int,
    visible: Tensor | None,
    batch: int,
    new: list[Columns | None],
    length: int,
    settled: int,
    shift: Tensor | None,
    first: int = 0,
) -> Record:
    """The record after a forward that added `length` columns, of which layer i kept `new[i]`.

    Args:
        past: record before the forward; None when nothing had been pruned.
        past_length: columns of the conversation before this forward.
        visible: (B, past_length + length) bool, False at padding; None where there is none.
        batch: B.
        new: per layer, the kept columns counted from this forward's first column; None for all of them.
        length: columns of this forward.
        settled: columns of it up to the last visual token.
        shift, first: see `Record`.
    """
    described = past.length if past is not None else 0
    joined: dict[tuple[int, int], Columns | None] = {}
    layers: list[Columns | None] = []
    for i, own in enumerate(new):
        old = past.layers[i] if past is not None else None
        key = (id(old), id(own))
        if key not in joined:
            start = described if old is not None else 0
            joined[key] = _join(old, start, past_length, visible, own, length, batch)
        layers.append(joined[key])
    padding = past.padding if past is not None else None
    if visible is not None:
        padding = visible.long().argmax(1)
    return Record(past_length + length, past_length + settled, layers, first, padding, shift)


def _join(
    old: Columns | None,
    described: int,
    past_length: int,
    seen: Tensor | None,
    own: Columns | None,
    length: int,
    batch: int,
) -> Columns | None:
    """One layer's columns: those described before, the ones since then (all present), and this forward's."""
    if own is None and old is None:
        return None
    device = (own or old).index.device  # type: ignore[union-attr]
    if seen is not None:
        seen = seen.to(device)
    if own is None:
        index = torch.arange(length, device=device).expand(batch, -1)
        own = Columns(index, None if seen is None else seen[:, past_length:])
    between = torch.arange(described, past_length, device=device).expand(batch, -1)
    parts = [
        Columns(between, None if seen is None else seen[:, described:past_length]),
        Columns(torch.where(own.index < 0, own.index, own.index + past_length), own.visible, own.bias),
    ]
    if old is not None:
        parts.insert(0, old)
    visible = None
    if any(p.visible is not None for p in parts):
        visible = torch.cat(
            [torch.ones_like(p.index, dtype=torch.bool) if p.visible is None else p.visible for p in parts],
            dim=1,
        )
    bias = None
    if any(p.bias is not None for p in parts):
        bias = torch.cat([p.biases(device) for p in parts], dim=1)
    return Columns(torch.cat([p.index for p in parts], dim=1), visible, bias)
