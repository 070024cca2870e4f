"""Flash attention, emulated on the CPU: the 2D mask it takes, its windows, its packed-sequence heuristic.

What is emulated is the interface transformers gives it, not its arithmetic. A GPU is needed for the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "flash_attention_2"


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None or attention_mask.shape == (key.shape[0], key.shape[2]), "not a 2D mask"
    batch, heads, length, width = query.shape
    entries = key.shape[2]
    if position_ids is not None and batch == 1 and attention_mask is None:
        # Read as packed sequences unless positions go up one by one.
        steps = position_ids[0].diff() if position_ids.shape[-1] == length else torch.ones(1)
        assert (steps == 1).all(), "positions with gaps were taken for packed sequences"
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    rows = torch.arange(entries - length, entries)[:, None]  # causal from the right
    columns = torch.arange(entries)[None]
    sees = columns <= rows
    if sliding_window is not None:
        sees = sees & (columns > rows - sliding_window)
    sees = sees[None, None].expand(batch, 1, -1, -1)
    if attention_mask is not None:
        sees = sees & attention_mask.bool()[:, None, None, :]
    logits = (query @ key.transpose(2, 3)) * (scaling if scaling is not None else width**-0.5)
    weights = logits.masked_fill(~sees, torch.finfo(logits.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@contextmanager
def emulated(model: Any) -> Iterator[Any]:
    """The model's text decoder runs on emulated flash attention inside the block."""
    config = model.config.get_text_config()
    stock = ALL_ATTENTION_FUNCTIONS[NAME]
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    config._attn_implementation = NAME
    try:
        yield model
    finally:
        config._attn_implementation = before
        ALL_ATTENTION_FUNCTIONS[NAME] = stock
