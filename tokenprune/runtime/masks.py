"""Attention masks for layers that hold fewer tokens than the model thinks.

Two rules, both needed. Fresh prefill: gather rows and columns of the mask the model built, which keeps whatever
structure it has. With a cache: rebuild it with transformers' own function, sized for the layer. Neither copies
anything from the device to the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask


def attention_backend(config: Any) -> str:
    return str(getattr(config, "_attn_implementation", None) or "eager")


def gather(mask: Tensor, index: Tensor, visible: Tensor | None) -> Tensor:
    """Rows and columns `index` of a mask.

    Args:
        mask: (B | 1, heads | 1, L, L) bool or additive, or (B, L) as flash attention takes it.
        index: (B, L') columns, filler clamped to 0.
        visible: (B, L') False where the result must be masked; None for nowhere.
    """
    batch = index.shape[0]
    index = index.to(mask.device)
    if mask.ndim == 2:
        short = mask.expand(batch, -1).gather(1, index)
        return short if visible is None else short & visible.to(mask.device, short.dtype)
    mask = mask.expand(batch, -1, -1, -1)
    rows = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    columns = index[:, None, None, :].expand(-1, mask.shape[1], index.shape[1], -1)
    return hide(mask.gather(2, rows).gather(3, columns), visible)


def hide(mask: Tensor, visible: Tensor | None) -> Tensor:
    """Mask the columns of a 4D mask that are not visible."""
    if visible is None:
        return mask
    keep = visible.to(mask.device)[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & keep
    return mask.masked_fill(~keep, torch.finfo(mask.dtype).min)


def rebuild(config: Any, hidden: Tensor, visible: Tensor | None, cache: Any, layer: int) -> Tensor | None:
    """A causal mask for `hidden` (B, q, D) entering `layer`, over its cached entries and the q new ones.

    Args:
        config: the text model's config.
        hidden: only its shape, dtype and device are read.
        visible: (B, entries + q) bool; None when all are visible (then backends that can do without a mask do).
        cache: the call's cache or None.
        layer: decoder layer index.
    """
    if "flash" in attention_backend(config):
        return visible
    # With padding the function would look at the mask's values (a device-to-host copy) to see whether it can be
    # left out; we know it cannot.
    mask: Tensor | None = create_causal_mask(
        config,
        hidden,
        None if visible is None else visible.to(hidden.device),
        cache,
        position_ids=None,
        layer_idx=layer,
        allow_is_causal_skip=visible is None,
    )
    return mask
