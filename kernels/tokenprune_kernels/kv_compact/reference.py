"""The truth: row by row, as the definition says it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def kv_compact_reference(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """``out[i][b, h, m] = tensors[i][b, h, index[b, m]]``, 0 where the index is -1; (B, H, M, D) each."""
    out = []
    for tensor in tensors:
        B, H, _, D = tensor.shape
        kept = tensor.new_zeros(B, H, index.shape[1], D)
        for b, row in enumerate(index.tolist()):
            for m, n in enumerate(row):
                if n >= 0:
                    kept[b, :, m] = tensor[b, :, n]
        out.append(kept)
    return out
