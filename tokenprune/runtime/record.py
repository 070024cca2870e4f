"""What a cache's layers hold after pruning. The record travels with the cache object, never with the model."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModeError

_ATTRIBUTE = "_tokenprune_record"


@dataclass
class Columns:
    """The entries of one layer's cache.

    Attributes:
        index: (B, C) column of the unpruned conversation each entry came from, -1 for filler.
        visible: (B, C) bool, False at filler and padding; None when every entry is visible.
    """

    index: Tensor
    visible: Tensor | None

    @property
    def length(self) -> int:
        return int(self.index.shape[1])


@dataclass
class Rows:
    """By what the rows of a cache are known again, should it be reordered, repeated or taken apart between calls.

    Attributes:
        layer: a layer that holds all it was given.
        entries: how many of its entries belong to the pruned prompt.
        marks: (B, head_dim) the largest of each row's first head's keys over those entries: exact in any order, and
            different where prompts are. None where no layer can tell.
        seen: the tensor the layer's keys were in after the last call. While they are, nothing was moved.
    """

    layer: int
    entries: int
    marks: Tensor | None
    seen: weakref.ref[Tensor] | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}  # a copy of a cache has other tensors


@dataclass
class Record:
    """Which columns of a conversation each layer's cache still holds.

    Attributes:
        length: columns of the unpruned conversation that are described; later ones are all present.
        settled: columns up to the last one that was pruned; behind them every layer holds every column.
        layers: one entry per decoder layer; None means the layer holds every column.
        padding: (B,) columns of padding before each row's first token, or None where there is none.
        shift: (B, 1) positions to take off after a cut with `positions="compact"`, or None.
    """

    length: int
    settled: int
    layers: list[Columns | None]
    padding: Tensor | None = None
    shift: Tensor | None = None
    after: int = 0  # columns added since to a static cache, whose own length only the device knows
    compiled: bool = False  # whether torch.compile may have run steps that `after` does not count
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
                seen[id(columns)] = Columns(columns.index[:, :-gone], visible)
            self.layers[i] = None if columns is None else seen[id(columns)]
        self.length = past

    def removed(self, layer: int) -> int:
        columns = self.layers[layer]
        return 0 if columns is None else self.length - columns.length

    @property
    def before_llm(self) -> bool:
        return self.layers[0] is not None


def is_static(cache: Any) -> bool:
    return cache is not None and bool(getattr(cache, "is_compileable", False))


def layer_length(cache: Any, layer: int) -> int:
    """Entries of one layer, as an int (copies from the device for a static cache only)."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.get_seq_length(layer))


def record_of(cache: Any) -> Record | None:
    return getattr(cache, _ATTRIBUTE, None)


def attach(cache: Any, record: Record | None) -> None:
    if record is None:
        cache.__dict__.pop(_ATTRIBUTE, None)
    else:
        setattr(cache, _ATTRIBUTE, record)


def read(cache: Any, num_layers: int, batch: int) -> Record | None:
    """The record of a cache, checked against the cache's own tensors.

    Raises:
        UnsupportedModeError: the cache was pruned but its record is gone or no longer fits it.
    """
    if cache is None or not getattr(cache, "layers", None):
        return None
    record = record_of(cache)
    if (
        record is not None
        and not is_static(cache)
        and layer_length(cache, 0) == 0 == layer_length(cache, num_layers - 1)
    ):
        attach(cache, None)  # a cache that was reset
        return None
    if record is not None:
        record = follow(cache, record, batch)
    if is_static(cache):
        if record is not None and record.compiled:
            record.after = layer_length(cache, 0) + record.removed(0) - record.length
        return record
    first, last = layer_length(cache, 0), layer_length(cache, num_layers - 1)
    if record is None:
        if first != last:
            raise UnsupportedModeError(
                f"this cache holds {first} tokens in its first layer and {last} in its last but says "
                "nothing of what was "
                f"pruned; pass on the cache object a pruned call returned (or a deep copy of it), not a rebuilt one"
            )
        return None
    past = first + record.removed(0)
    if past > last + record.removed(num_layers - 1):
        raise UnsupportedModeError(
            "a call on this cache failed half way: its first layers hold tokens that its last ones do not; start again "
            "from the prompt, or from a copy made before"
        )
    if last + record.removed(num_layers - 1) > past:
        # transformers before 5.23 crops to an absolute length, which leaves the shorter layers too long.
        crop(cache, record, past)
        last = layer_length(cache, num_layers - 1)
    if past != last + record.removed(num_layers - 1) or past < record.settled:
        raise UnsupportedModeError(
            "this cache was cropped into a pruned prompt, so its record no longer fits; start again from the prompt"
        )
    if past < record.length:
        record.cut_to(past)
    return record


def remember(cache: Any, record: Record) -> None:
    """Note after a call in which tensors the rows are, and what they are known by if that is not noted yet."""
    if record.rows is None:
        record.rows = _rows(cache, record)
    keys = getattr(cache.layers[record.rows.layer], "keys", None)
    record.rows.seen = weakref.ref(keys) if isinstance(keys, Tensor) else None


def _rows(cache: Any, record: Record) -> Rows:
    for i in reversed(range(len(record.layers))):
        columns, layer = record.layers[i], cache.layers[i]
        keys = getattr(layer, "keys", None)
        if columns is None or not isinstance(keys, Tensor) or keys.ndim != 4:
            continue
        entries = columns.length - (record.length - record.settled)
        # Not a window that lets go of old entries, nor the unquantised rest of a quantised layer.
        whole = (
            not getattr(layer, "is_sliding", False) if is_static(cache) else keys.shape[2] == columns.length
        )
        if whole and 0 < entries <= keys.shape[2]:
            return Rows(i, entries, _marks(keys, entries), None)
    return Rows(len(record.layers) - 1, 0, None, None)


def _marks(keys: Tensor, entries: int) -> Tensor:
    return keys[:, 0, :entries].amax(1)


def follow(cache: Any, record: Record, batch: int) -> Record:
    """The record of a cache whose rows were reordered, repeated or left out since (attached to it, too).

    Args:
        cache: with a record.
        record: its own.
        batch: rows of the call that is about to use it.

    Raises:
        UnsupportedModeError: rows that are not those of the prompt, or that cannot be told apart.
    """
    rows, known = record.rows, record.batch
    keys = None if rows is None else getattr(cache.layers[rows.layer], "keys", None)
    unmoved = rows is not None and rows.seen is not None and rows.seen() is keys and keys is not None
    if rows is None or not isinstance(keys, Tensor) or known == batch == 1 or (unmoved and known == batch):
        source = None
    elif keys.shape[2] < rows.entries and rows.marks is not None:
        source = None  # cropped into the prompt, which the lengths tell
    elif known == 1 or (rows.marks is None and _are_alike(record)):
        source = torch.zeros(batch, dtype=torch.long, device=keys.device)
    elif rows.marks is None:
        raise UnsupportedModeError(
            "this cache was copied or its rows were moved since the last call, and it no longer holds what they could "
            "be told apart by; go on with the cache itself, one row at a time, or from the prompts"
        )
    else:
        same = (_marks(keys, rows.entries)[:, None] == rows.marks.to(keys.device)[None]).all(-1)
        source = same.long().argmax(1)
        if not bool(same.any(1).all()):
            raise UnsupportedModeError(
                "this cache holds other rows than the pruned prompts it was made by; start again from the prompts"
            )
    if (
        source is not None
        and len(source) == known
        and bool((source == torch.arange(known, device=source.device)).all())
    ):
        source = None
    if source is not None:
        record = _taken(record, source)
        attach(cache, record)
    if record.batch != batch:
        raise UnsupportedModeError(
            f"this cache was pruned with batch {record.batch} and is used with batch {batch}; repeat or select the "
            f"cache's rows first (batch_repeat_interleave, batch_select_indices)"
        )
    return record


def _are_alike(record: Record) -> bool:
    """Whether all rows were pruned alike, as the beams of one prompt are."""
    distinct = {id(own): own for own in record.layers if own is not None}.values()
    tensors = [t for own in distinct for t in (own.index, own.visible) if t is not None]
    tensors += [t for t in (record.padding, record.shift) if t is not None]
    return all(bool((t == t[:1]).all()) for t in tensors)


def crop(cache: Any, record: Record, past: int) -> None:
    """Take the last entries off each layer that holds more than belong to `past` columns."""
    for i, layer in enumerate(cache.layers):
        entries = past - record.removed(i)
        if layer_length(cache, i) > entries:
            layer.keys, layer.values = layer.keys[..., :entries, :], layer.values[..., :entries, :]


def _taken(record: Record, source: Tensor) -> Record:
    """The rows `source` of a record."""

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, source.to(x.device))

    seen: dict[int, Columns] = {}
    layers: list[Columns | None] = []
    for columns in record.layers:
        if columns is not None and id(columns) not in seen:
            index = columns.index.index_select(0, source.to(columns.index.device))
            seen[id(columns)] = Columns(index, rows(columns.visible))
        layers.append(None if columns is None else seen[id(columns)])
    own = record.rows
    return replace(
        record,
        layers=layers,
        padding=rows(record.padding),
        shift=rows(record.shift),
        rows=None if own is None else replace(own, marks=rows(own.marks)),
    )


def extend(
    past: Record | None,
    past_length: int,
    visible: Tensor | None,
    batch: int,
    new: list[Columns | None],
    length: int,
    settled: int,
    shift: Tensor | None,
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
        shift: see `Record.shift`.
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
    return Record(past_length + length, past_length + settled, layers, padding, shift)


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
        Columns(torch.where(own.index < 0, own.index, own.index + past_length), own.visible),
    ]
    if old is not None:
        parts.insert(0, old)
    visible = None
    if any(p.visible is not None for p in parts):
        visible = torch.cat(
            [torch.ones_like(p.index, dtype=torch.bool) if p.visible is None else p.visible for p in parts],
            dim=1,
        )
    return Columns(torch.cat([p.index for p in parts], dim=1), visible)
