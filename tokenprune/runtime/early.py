"""`compact_early`: after a prompt, what was dropped leaves the caches of the layers before the last cut, too.

The first layer that attends stays whole: generate() reads a conversation's length off it, and with it every later turn
works.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModeError
from tokenprune.runtime.call import Call
from tokenprune.runtime.current import GENERATE, called_from
from tokenprune.runtime.masks import local_attention
from tokenprune.runtime.record import Columns
from tokenprune_kernels.kv_compact import kv_compact


def check_early(call: Call) -> None:
    """Refuse what has no cache: generate() then gives the model its answer so far as a part of the prompt.

    Raises:
        UnsupportedModeError: nobody can tell where the answer begins, from which alone the dropped tokens are hidden.
    """
    if call.stages is not None and call.config.arguments.compact_early and called_from(GENERATE):
        raise UnsupportedModeError(
            "compact_early is about the cache, and generate() was called with use_cache=False; leave one of them out"
        )


def compact_early(call: Call, held: list[Columns | None], text_config: Any) -> list[Columns | None]:
    """Shorten the caches of a prompt's layers from 1 on to what its last cut left.

    Args:
        call: at its end.
        held: per layer, the columns of this call that its cache holds; None for all of them.
        text_config: of the text model.

    Returns:
        The same, afterwards. Layers whose cache is quantised are left as they are, and so are those that look back only
        so far, whatever cache holds them: answers must not depend on its class.
    """
    assert call.stages is not None
    left = call.stages.done[-1]
    first = call.kv.first
    alike: dict[tuple[int, int], list[int]] = {}  # layers that hold the same entries
    for i, own in enumerate(held):
        before = call.past - (0 if call.record is None else call.record.removed(i))
        looks_back = local_attention(text_config, i)[1] is not None
        if (
            i != first
            and own is not left
            and not looks_back
            and _is_whole(call, i, before + _length(call, own))
        ):
            alike.setdefault((id(own), before), []).append(i)
    held, moved = list(held), []
    for (_, before), members in alike.items():
        own = held[members[0]]
        slots = left.index if own is None else torch.searchsorted(own.index, left.index)
        entries = torch.cat(
            [
                torch.arange(before, device=slots.device).expand(call.batch, -1),
                torch.where(left.index < 0, left.index, slots + before),
            ],
            dim=1,
        )
        bias = None
        if own is not None and own.bias is not None:
            bias = own.bias.gather(1, slots.clamp(max=own.length - 1)).masked_fill(left.index < 0, 0)
        shorter = Columns(left.index, left.visible, bias)
        layers = [call.cache.layers[i] for i in members]
        moved.append((layers, _length(call, own) - left.length, _taken(call, layers, entries, left)))
        for i in members:
            held[i] = shorter
    for layers, fewer, tensors in moved:  # nothing can fail from here on
        _put(call, layers, fewer, tensors)
    return held


def _length(call: Call, own: Columns | None) -> int:
    return call.length if own is None else own.length


def _is_whole(call: Call, i: int, entries: int) -> bool:
    """Whether a layer's tensors hold exactly what it was given."""
    layer: Any = call.cache.layers[i]
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor) or keys.ndim != 4:
        return False
    return call.kv.spans_more or keys.shape[2] == entries


def _taken(call: Call, layers: list[Any], entries: Tensor, left: Columns) -> list[Tensor]:
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    # In place needs ascending rows, and filler stands on the left.
    return kv_compact(tensors, entries, inplace=call.kv.spans_more and left.visible is None)


def _put(call: Call, layers: list[Any], fewer: int, tensors: list[Tensor]) -> None:
    for layer, keys, values in zip(layers, tensors[::2], tensors[1::2], strict=True):
        if not call.kv.spans_more:
            layer.keys, layer.values = keys, values
            continue
        for whole, short in ((layer.keys, keys), (layer.values, values)):
            if whole.data_ptr() != short.data_ptr():
                whole[:, :, : short.shape[2]].copy_(short)
        layer.cumulative_length.sub_(fewer)
