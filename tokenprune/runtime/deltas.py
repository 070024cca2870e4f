"""Conversations in turn on models whose positions have several axes.

Stock keeps the offset between columns and positions (`rope_deltas`) of the last prompt with the model, so that a
conversation going on after another one's prompt would get the other's positions. Here it is kept with the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModeError
from tokenprune.runtime.call import Call
from tokenprune.runtime.record import Record

_ATTRIBUTE = "rope_deltas"


def note(base: Any, call: Call, record: Record) -> None:
    """After a pruned call: which offset its conversation goes on with.

    Args:
        base: the inner multimodal model, which keeps the last prompt's.
        call: at its end.
        record: of its cache.
    """
    stock, before = getattr(base, _ATTRIBUTE, None), call.record
    if before is not None and before.deltas is not None and stock is call.deltas:
        record.deltas = before.deltas  # no new one was computed in this call
    elif stock is not None:
        record.deltas = _by_row(stock, call.batch), stock


def restore(base: Any, call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
    """A call's inputs with the positions of its own conversation; where there are none, `base` computes them rightly.

    Raises:
        UnsupportedModeError: the conversation is in a static cache, whose later steps may be compiled.
    """
    stock, record = getattr(base, _ATTRIBUTE, None), call.record
    call.deltas = stock
    if record is None or record.deltas is None or stock is None or record.deltas[1] is stock:
        return inputs
    own = record.deltas[0]
    if call.kv.spans_more:
        raise UnsupportedModeError(
            "another conversation ran on this model since, and stock keeps its positions (rope_deltas) with the model; "
            "with a static cache finish one conversation before the next, or use a growing cache"
        )
    ids = inputs.get("position_ids")
    if ids is None:
        setattr(base, _ATTRIBUTE, own)
        call.deltas, record.deltas = own, (own, own)
        return inputs
    text = _text_positions(call, ids)
    made, wanted = text + _by_row(stock, call.batch).to(text), text + own.to(text)
    # The first of four is the text's.
    axes = slice(1, None) if ids.ndim == 3 and ids.shape[0] == 4 else slice(None)
    corrected = ids.clone()
    # What the caller computed in another way stays.
    corrected[axes] = torch.where(ids[axes] == made, wanted, ids[axes])
    return {**inputs, "position_ids": corrected}


def _text_positions(call: Call, ids: Tensor) -> Tensor:
    """(B | 1, L) the running count of the call's columns, as generate() makes it."""
    if call.attention is None:
        return torch.arange(call.past, call.past + call.length, device=ids.device)[None]
    real = call.attention.to(ids.device)
    return (real.long().cumsum(-1) - 1).masked_fill(real == 0, 0)[:, -call.length :]


def _by_row(deltas: Tensor, batch: int) -> Tensor:
    """(batch, 1): a prompt's offset is that of its beams."""
    return deltas.repeat_interleave(max(1, batch // len(deltas)), 0)
