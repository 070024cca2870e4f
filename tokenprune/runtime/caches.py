"""How long a cache is, for growing and for static ones: the one place that knows the difference."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import StaticLayer

from tokenprune.errors import UnsupportedModeError
from tokenprune.runtime.record import Columns, Record

_WHOLE = "_tokenprune_length"  # of a static layer that was shrunk: the length it was made for
_STEP = 16


class CacheView:
    """A growing cache, or none at all: its length is known on the host.

    Attributes:
        cache: the cache, or None.
        first: the first layer that has entries: those of recurrent layers hold a state instead.
        spans_more: whether masks span more entries than are used, so that there always has to be one.
    """

    spans_more = False

    def __init__(self, cache: Any) -> None:
        self.cache, self.first = cache, 0
        layers = getattr(cache, "layers", None) or []
        while self.first < len(layers) - 1 and not has_entries(layers[self.first]):
            self.first += 1

    def last(self, num_layers: int) -> int:
        """The last of so many decoder layers that has entries."""
        layers = [] if self.cache is None else self.cache.layers[:num_layers]
        found = len(layers) - 1
        while found > self.first and not has_entries(layers[found]):
            found -= 1
        return max(found, self.first)

    def entries(self, layer: int) -> int:
        """Entries a layer holds."""
        if self.cache is None or layer >= len(self.cache.layers):
            return 0
        return int(self.cache.get_seq_length(layer))

    def past(self, record: Record | None, length: int) -> int:
        """Unpruned columns of the conversation before a call of `length` columns."""
        first = self.first
        return self.entries(first) + (0 if record is None else record.removed(first))

    def was_reset(self, num_layers: int, length: int) -> bool:
        """Whether a cache that has held a conversation is empty again.

        Args:
            num_layers: decoder layers.
            length: columns of the call about to use it.
        """
        return self.entries(self.first) == self.entries(self.last(num_layers)) == 0

    def is_step(self, past: int, length: int) -> bool:
        """Whether a call without images goes on with a conversation of which nothing was pruned."""
        return past > 0

    def unwritten(self, layer: int, used: int) -> int:
        """Entries beyond the `used` ones that a layer's mask spans."""
        return 0

    def gone(self, layer: int, length: int) -> int:
        """Entries of the conversation that a layer will have let go of when `length` more come in (a window does)."""
        return 0 if self.cache is None else int(self.cache.get_mask_sizes(length, layer)[1])

    def holds_all(self, layer: int, columns: Columns) -> bool:
        """Whether a layer's tensors hold all it was given: no window has let go of any, nothing is quantised."""
        keys = getattr(self.cache.layers[layer], "keys", None)
        return isinstance(keys, Tensor) and keys.ndim == 4 and keys.shape[2] == columns.length


class StaticView(CacheView):
    """A static cache: allocated ahead, and only the device knows how much of it is used."""

    spans_more = True

    def past(self, record: Record | None, length: int) -> int:
        if record is None:
            return self.entries(self.first) if length > 1 else 0  # of a step nobody asks, and it costs a copy
        if record.compiled:  # steps that ran without the hooks
            record.after = self.entries(record.first) + record.removed(record.first) - record.length
        return record.length + record.after

    def was_reset(self, num_layers: int, length: int) -> bool:
        # generate() resets its static cache and uses it again; a step is never the first call.
        return length > 1 and self.entries(self.first) == 0

    def is_step(self, past: int, length: int) -> bool:
        return past > 0 or length == 1

    def unwritten(self, layer: int, used: int) -> int:
        return max(0, int(self.cache.layers[layer].get_max_length()) - used)

    def holds_all(self, layer: int, columns: Columns) -> bool:
        own = self.cache.layers[layer]
        return isinstance(getattr(own, "keys", None), Tensor) and not getattr(own, "is_sliding", False)


def has_entries(layer: Any) -> bool:
    """Whether a layer of a cache holds keys, an entry per token: a recurrent one holds a state of one size."""
    return hasattr(layer, "keys")


def check_is_cache(cache: Any) -> None:
    """Refuse what does not say what each layer holds.

    Raises:
        UnsupportedModeError: names its class.
    """
    if cache is not None and not isinstance(getattr(cache, "layers", None), list):
        raise UnsupportedModeError(
            f"a {type(cache).__name__} has no layers, some of which could be shorter; pass a transformers Cache or none"
        )


def is_static(cache: Any) -> bool:
    return cache is not None and bool(getattr(cache, "is_compileable", False))


def shrink(cache: Any, first: int, length: int, kept: int) -> None:
    """At a cut, before anything is written: let layers of a static cache be allocated without what was dropped.

    A layer allocates at its first update, so that those from the cut on still can be told. Their lengths are rounded up
    for shapes to repeat: a step is compiled once for each. Layers that are allocated already, and those of windows,
    which are short anyhow, stay as they are.

    Args:
        cache: of a call that begins its conversation.
        first: layer that is entered with fewer tokens.
        length: tokens of the prompt.
        kept: tokens that are left.
    """
    for layer in cache.layers[first:]:
        if type(layer) is not StaticLayer or layer.is_initialized:
            continue
        whole = getattr(layer, _WHOLE, layer.max_cache_len)
        room = -(-(kept + whole - length) // _STEP) * _STEP
        if room < whole:
            setattr(layer, _WHOLE, whole)
            layer.max_cache_len = room


def regrow(cache: Any) -> None:
    """Let a static cache that was emptied be allocated anew where it is short: the next prompt may be longer."""
    for layer in cache.layers:
        whole = layer.__dict__.pop(_WHOLE, None)
        if whole is not None:
            layer.max_cache_len, layer.is_initialized = whole, False
            layer.keys = layer.values = None


def view_of(cache: Any) -> CacheView:
    return StaticView(cache) if is_static(cache) else CacheView(cache)


def crop(cache: Any, record: Record, past: int) -> None:
    """Take the last entries off each layer that holds more than belong to `past` columns."""
    view = view_of(cache)
    for i, layer in enumerate(cache.layers):
        if not has_entries(layer):
            continue
        entries = past - record.removed(i)
        if view.entries(i) > entries:
            layer.keys, layer.values = layer.keys[..., :entries, :], layer.values[..., :entries, :]
