"""Rows of a pruned cache that are reordered, repeated or left out between calls: their record goes with them."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModeError
from tokenprune.runtime.caches import CacheView, crop, regrow, view_of
from tokenprune.runtime.record import Columns, Marks, Record, Rows, attach, record_of

HALF_WAY = (
    "a call on this cache failed half way, and not all of its layers hold the same; start again from the prompt, or "
    "from a copy made before"
)


def remember(cache: Any, record: Record) -> None:
    """Note after a call in which tensors the rows are, and what they are known by if that is not noted yet."""
    if record.rows is None:
        record.rows = _rows(cache, record)
    keys, first = (getattr(cache.layers[i], "keys", None) for i in (record.rows.layer, record.first))
    record.rows.seen = weakref.ref(keys) if isinstance(keys, Tensor) else None
    record.rows.first = weakref.ref(first) if isinstance(first, Tensor) else None


def _rows(cache: Any, record: Record) -> Rows:
    for i in reversed(range(len(record.layers))):
        columns, layer = record.layers[i], cache.layers[i]
        keys = getattr(layer, "keys", None)
        if columns is None or not isinstance(keys, Tensor) or keys.ndim != 4:
            continue
        settled = columns.length - (record.length - record.settled)
        if view_of(cache).holds_all(i, columns) and 0 < settled <= columns.length <= keys.shape[2]:
            lengths = dict.fromkeys((columns.length, settled))
            return Rows(i, tuple(Marks(n, _marks(keys, n)) for n in lengths), None)
    return Rows(len(record.layers) - 1, (), None)


def _marks(keys: Tensor, entries: int) -> Tensor:
    return keys[:, 0, :entries].amax(1)


def _sources(keys: Tensor, marks: Marks, record: Record) -> Tensor:
    """(batch,) the row of the pruned prompts that each row of a cache is.

    Raises:
        UnsupportedModeError: one is none of them, or may be several that were not pruned alike.
    """
    same = (_marks(keys, marks.entries)[:, None] == marks.values.to(keys.device)[None]).all(-1)
    matches, found = same.sum(1), same.long().argmax(1)
    if not bool(matches.all()):
        raise UnsupportedModeError(
            "this cache holds other rows than the pruned prompts it was made by; start again from the prompts"
        )
    for row in (matches > 1).nonzero()[:, 0].tolist():
        if not _are_alike(record, same[row].nonzero()[:, 0]):
            raise UnsupportedModeError(
                "the rows of this cache were moved since the last call, and some, of which only padding is left, "
                "cannot be told apart; go on with the cache as it was, or from the prompts"
            )
    return found


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
    fitting = [] if keys is None or rows is None else [m for m in rows.marks if m.entries <= keys.shape[2]]
    if rows is None or not isinstance(keys, Tensor) or known == batch == 1 or (unmoved and known == batch):
        source = None
    elif rows.marks and not fitting:
        source = None  # cropped into the prompt, which the lengths tell
    elif known == 1 or (not rows.marks and _are_alike(record)):
        source = torch.zeros(batch, dtype=torch.long, device=keys.device)
    elif not rows.marks:
        raise UnsupportedModeError(
            "the rows of this cache were moved since the last call, or it was read from a file, and its windows no "
            "longer hold what they could be told apart by; go on one row at a time, or from the prompts"
        )
    else:
        source = _sources(keys, fitting[0], record)
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


def _are_alike(record: Record, rows: Tensor | None = None) -> bool:
    """Whether rows (m,), or all of them, were pruned alike, as the beams of one prompt are."""
    distinct = {id(own): own for own in record.layers if own is not None}.values()
    tensors = [t for own in distinct for t in (own.index, own.visible, own.bias) if t is not None]
    tensors += [t for t in (record.padding, record.shift) if t is not None]
    if rows is not None:
        tensors = [t.index_select(0, rows.to(t.device)) for t in tensors]
    return all(bool((t == t[:1]).all()) for t in tensors)


def _taken(record: Record, source: Tensor) -> Record:
    """The rows `source` of a record."""

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, source.to(x.device))

    seen: dict[int, Columns] = {}
    layers: list[Columns | None] = []
    for columns in record.layers:
        if columns is not None and id(columns) not in seen:
            index = columns.index.index_select(0, source.to(columns.index.device))
            seen[id(columns)] = Columns(index, rows(columns.visible), rows(columns.bias))
        layers.append(None if columns is None else seen[id(columns)])
    deltas = record.deltas
    if deltas is not None:
        deltas = deltas[0].index_select(0, source.to(deltas[0].device)), deltas[1]
    own = record.rows
    marks = () if own is None else own.marks
    taken_marks = tuple(Marks(m.entries, m.values.index_select(0, source.to(m.values.device))) for m in marks)
    return replace(
        record,
        layers=layers,
        padding=rows(record.padding),
        shift=rows(record.shift),
        deltas=deltas,
        rows=None if own is None else replace(own, marks=taken_marks),
    )


def read(view: CacheView, num_layers: int, batch: int, length: int) -> Record | None:
    """The record of a cache, checked against the cache's own tensors.

    Args:
        view: of the cache.
        num_layers: decoder layers.
        batch, length: shape of the call about to use it.

    Raises:
        UnsupportedModeError: the cache was pruned but its record is gone or no longer fits it.
    """
    cache = view.cache
    if cache is None or not getattr(cache, "layers", None):
        return None
    record = record_of(cache)
    if record is not None and _is_untouched(view, record, batch):
        return record
    if record is not None and view.was_reset(num_layers, length):
        attach(cache, None)
        if view.spans_more:
            regrow(cache)
        return None
    if record is not None and record.unfinished:
        raise UnsupportedModeError(HALF_WAY)
    if record is not None:
        record = follow(cache, record, batch)
    if not view.spans_more:  # a static cache's lengths are on the device
        _check_lengths(view, record, num_layers)
    return record


def _is_untouched(view: CacheView, record: Record, batch: int) -> bool:
    """Whether a growing cache is as the last call left it: one that is moved, cropped or reset has other tensors."""
    rows = record.rows
    if record.unfinished or view.spans_more or rows is None or rows.seen is None or rows.first is None:
        return False
    keys, first, layers = rows.seen(), rows.first(), view.cache.layers
    if keys is None or first is None:
        return False
    return keys is layers[rows.layer].keys and first is layers[record.first].keys and keys.shape[0] == batch


def _check_lengths(view: CacheView, record: Record | None, num_layers: int) -> None:
    lowest, highest = view.first, view.last(num_layers)
    first, last = view.entries(lowest), view.entries(highest)
    if record is None:
        if first != last:
            raise UnsupportedModeError(
                f"this cache holds {first} tokens in its first layer and {last} in its last but says nothing of what "
                f"was pruned; pass on the cache object a pruned call returned (or a deep copy of it), not a rebuilt one"
            )
        return
    past, own = first + record.removed(lowest), last + record.removed(highest)
    if past > own:
        raise UnsupportedModeError(HALF_WAY)
    if own > past:
        # transformers before 5.23 crops to an absolute length, which leaves the shorter layers too long.
        crop(view.cache, record, past)
        own = view.entries(highest) + record.removed(highest)
    if past != own or past < record.settled:
        raise UnsupportedModeError(
            "this cache was cropped into a pruned prompt, so its record no longer fits; start again from the prompt"
        )
    if past < record.length:
        record.cut_to(past)
