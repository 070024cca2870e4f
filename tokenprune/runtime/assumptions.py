"""What the hooks take for granted of transformers, looked at in the first pruned calls of a wrapped model.

A release may rename what it hands its layers, or lay a cache out in another way; the answers would be wrong without a
word. So a model's first pruned call, and its first with each class of cache, is checked; what does not hold is a
refusal that names the release. Later calls cost a look at their output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune.releases import NEWEST, cache_of, names_cache, release
from tokenprune.runtime.caches import has_entries
from tokenprune.runtime.call import Call
from tokenprune.runtime.record import Record

# What a layer is given by name, of which those that hold a value per token are shortened.
_KNOWN = ("hidden_states", "attention_mask", "position_embeddings", "position_ids")


def refusal(what: str) -> UnsupportedModelError:
    """The error that names the release."""
    newest = ".".join(map(str, NEWEST))
    return UnsupportedModelError(
        f"{release()} {what}, so pruning would be wrong; pip install 'transformers=={newest}.*', or tell us"
    )


class Assumptions:
    """Of one wrapped model: what has been seen to hold."""

    def __init__(self) -> None:
        self._layers: set[int] = set()  # entered in the first pruned call, until all were
        self.hold = False  # of what every layer is given
        self._caches: set[type] = set()

    def check_layer(self, i: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: Call) -> None:
        """What layer i of a pruned call is given.

        Raises:
            UnsupportedModelError: it comes under other names, or there is more of it.
        """
        if self.hold or call.stages is None:
            return
        self._layers.add(i)
        if any(arg is not None for arg in args[1:]):
            raise refusal(f"hands its decoder layers {len(args)} arguments by place")
        missing = [name for name in _KNOWN[1:] if name not in kwargs]
        if missing or not names_cache(kwargs):
            raise refusal(
                f"hands its decoder layers no {(missing or ['cache'])[0]!r} (but {', '.join(kwargs)})"
            )
        for name, value in kwargs.items():
            if name not in _KNOWN and value is not cache_of(kwargs) and _is_per_token(value, call.length):
                raise refusal(f"hands its decoder layers {name!r}, which nobody shortens")

    @staticmethod
    def check_tower(call: Call) -> None:
        """Before layer 0: what the method wants of the vision tower was seen while it ran.

        Raises:
            UnsupportedModelError: it was not.
        """
        needs = call.config.needs
        for kind in call.kinds if call.config.scores else ():
            facts = call.facts.get(kind)
            unseen = (
                facts is None or (needs.vision and not facts.vision) or (needs.pixels and not facts.pixels)
            )
            if unseen and (needs.vision or needs.pixels):
                raise refusal(f"encodes {kind}s without calling the parts of the vision tower as modules")

    @staticmethod
    def check_states(call: Call) -> None:
        """On entering a cut's layer: the states that selections still need were caught in the layer before.

        Raises:
            UnsupportedModelError: they were not.
        """
        stages, needs = call.stages, call.config.needs_at(call.cuts_done)
        assert stages is not None
        raw = {} if call.caught is None else call.caught.raw
        seen = (
            needs.ahead is not None
            or raw.keys() >= set(needs.projected)
            or not stages.missing(call.cuts_done)
        )
        if call.config.scores and not seen:
            raise refusal("computes attention without calling its projections as modules")

    def check_call(self, call: Call, output: Any, layers: int) -> None:
        """A pruned call at its end: every cut was made, in every layer, and the cache seen is the one returned.

        Raises:
            UnsupportedModelError: something else happened.
        """
        assert call.stages is not None
        if call.cuts_done < len(call.config.cuts):
            raise refusal("does not call its decoder layers as modules: a cut was never reached")
        if not self.hold and len(self._layers) < layers:
            raise refusal(f"does not call all of its {layers} decoder layers as modules")
        self.hold = True
        returned = _caches_in(output)
        if any(cache is not call.cache for cache in returned):
            raise refusal("returns another cache than its decoder layers were given")

    def check_cache(self, call: Call, record: Record) -> None:
        """A cache after a pruned call: each layer holds as many entries as are recorded.

        Raises:
            UnsupportedModelError: it holds others, or in another layout.
        """
        kind = type(call.cache)
        if kind in self._caches:
            return
        total = call.past + call.length
        for i, layer in enumerate(call.cache.layers[: len(record.layers)]):
            if not has_entries(layer):
                continue
            held, wanted = int(layer.get_seq_length()), total - record.removed(i)
            if held != wanted:
                raise refusal(
                    f"says that a {kind.__name__} has {held} entries in layer {i} where {wanted} were made"
                )
            keys = getattr(layer, "keys", None)
            if isinstance(keys, Tensor) and not _fits(keys.shape, call, layer, wanted):
                raise refusal(
                    f"lays a {kind.__name__} out in another way: keys of layer {i} are {tuple(keys.shape)}"
                )
        self._caches.add(kind)


def _is_per_token(value: Any, length: int) -> bool:
    """Whether it may hold something for each token of the prompt, or what was cached of it."""
    if isinstance(value, Tensor):
        return value.ndim > 1 and length in value.shape
    if isinstance(value, list | tuple | dict):
        parts = value.values() if isinstance(value, dict) else value
        return any(_is_per_token(part, length) for part in parts)
    return hasattr(value, "get_seq_length")


def _caches_in(output: Any) -> list[Any]:
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return [part for part in parts if hasattr(part, "get_seq_length")]


def _fits(shape: Sequence[int], call: Call, layer: Any, entries: int) -> bool:
    """Whether keys may be (B, heads, entries, head_dim); of windows and quantised layers only a part is there."""
    part = getattr(layer, "is_sliding", False) or hasattr(layer, "_quantized_keys") or call.kv.spans_more
    return len(shape) == 4 and shape[0] == call.batch and (part or shape[2] == entries)
