"""What is told from a cache's length, and wrong once that is short: positions, masks, the temperature of queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.runtime.call import Call
from tokenprune.runtime.layer_masks import columns
from tokenprune.runtime.record import Record
from tokenprune.runtime.wrapped import Wrapped


def continue_short(runtime: Wrapped, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Decode after a cut before the LLM: even layer 0 holds fewer entries than the mask has columns."""
    record, masks = call.record, runtime.masks
    assert record is not None
    if not call.positions_given:  # what the model would make of the cache's length is wrong
        start = call.past + runtime.family.first_position
        kwargs["position_ids"] = torch.arange(start, start + call.length, device=hidden.device)[None]
    if record.shift is not None:
        kwargs["position_ids"] = kwargs["position_ids"] - record.shift.to(hidden.device)
    mask, first = kwargs.get("attention_mask"), record.first
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if call.length == 1 and mask is call.attention:
            kwargs["attention_mask"] = _closed_up(mask, record, call.past + 1 - record.length)
        else:
            kwargs["attention_mask"] = masks.entries(call, first, hidden).to(mask.dtype)
    elif isinstance(mask, dict):
        example = {masks.kinds[i]: i for i in reversed(runtime.attending)}
        kwargs["attention_mask"] = {
            kind: masks.rebuild(call, example[kind], hidden, all_visible=False) if kind in example else own
            for kind, own in mask.items()
        }
    elif mask is not None or record.layers[first].visible is not None:  # type: ignore[union-attr]
        kwargs["attention_mask"] = masks.rebuild(call, first, hidden, all_visible=False)
    return kwargs


def _closed_up(mask: Tensor, record: Record, since: int) -> Tensor:
    """A step's 2D mask (B, columns), of what layer 0 still holds and the columns since."""
    own = record.layers[record.first]
    assert own is not None
    if own.visible is None:
        return mask[:, -own.length - since :]  # all that is left of the prompt is seen
    return torch.cat([own.visible.to(mask), mask[:, mask.shape[1] - since :]], dim=1)


def rescale(
    runtime: Wrapped, i: int, attention: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> Tensor | None:
    """Queries whose temperature the layer tells from its cache's length get that of their original columns."""
    call = runtime.call
    if call is None or (not call.cuts_done and (call.record is None or call.record.layers[i] is None)):
        return None
    original = columns(call, i, output.device)
    assumed = torch.arange(original.shape[1], device=output.device)
    wanted, made = (runtime.decoder.temperature(attention, x) for x in (original, assumed))
    assert wanted is not None and made is not None
    ratio = (wanted / made)[:, -output.shape[1] :, None]
    return (output * ratio).to(output.dtype)
