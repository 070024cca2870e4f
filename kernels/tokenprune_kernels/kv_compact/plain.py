"""Plain PyTorch backend: one gather of whole rows per tensor. Runs on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kv_compact_plain(tensors: Sequence[Tensor], index: Tensor, *, inplace: bool = False) -> list[Tensor]:
    """Keep rows ``index`` of tensors of one shape, dtype and device.

    Arguments and result are those of :func:`tokenprune_kernels.kv_compact.kv_compact`, which has checked them.
    """
    B, H, N, D = tensors[0].shape
    M = index.shape[1]
    # Rows of all heads, numbered through, so that index_select copies whole rows.
    first = torch.arange(B * H, device=index.device).view(B, H, 1) * N
    rows = (index.clamp(min=0)[:, None] + first).view(-1)
    filler = (index < 0)[:, None, :, None]
    out = []
    for tensor in tensors:
        kept = tensor.reshape(B * H * N, D).index_select(0, rows).view(B, H, M, D).masked_fill_(filler, 0)
        if inplace:
            kept = tensor[:, :, :M].copy_(kept)
        out.append(kept)
    return out
