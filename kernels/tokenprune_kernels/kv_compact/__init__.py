"""Keep chosen rows of many K and V tensors at once: what takes pruned tokens out of a KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenprune_kernels.backend import backend_for
from tokenprune_kernels.kv_compact.arguments import check_arguments, groups
from tokenprune_kernels.kv_compact.plain import kv_compact_plain

__all__ = ["kv_compact"]


def kv_compact(tensors: Sequence[Tensor], index: Tensor, *, inplace: bool = False) -> list[Tensor]:
    """Take rows ``index`` of every tensor: ``out[i][b, h, m] = tensors[i][b, h, index[b, m]]``, 0 where it is -1.

    Bits are moved, never converted. On CUDA there is one launch per group of tensors that share device, dtype, shape
    and strides, whatever their number (all K and V of a cache are one group); nothing waits for the device. Heads are
    those the tensors have: grouped-query caches need nothing more.

    Args:
        tensors: each (B, H, N, D), floating. The keys and values of all layers, with any strides; B and N
            are the same in all, H and D may differ.
        index: (B, M), int64, M <= N. Rows to keep, on any of the tensors' devices. -1 is filler: ragged counts are
            padded with it. Other values must lie in [0, N); they are not checked, which would wait for the device.
        inplace: bool (default False). Write into the tensors themselves. Each row of ``index`` must then ascend
            strictly up to its filler, which stands at the end. This frees nothing: the result is views of the first M
            rows, and the storage goes only when something else (a cache's next concatenation) replaces them. Rows from
            M on keep what they held.

    Returns:
        list of Tensor, each (B, H, M, D). New contiguous tensors, or views of ``tensors`` when in place.

    Raises:
        TypeError: Not tensors, or an index that is not int64.
        ValueError: Shapes that do not fit together, or tensors that overlap themselves (expanded ones) in place.
    """
    check_arguments(tensors, index, inplace)
    out: list[Tensor] = list(tensors)
    for members in groups(tensors):
        own = [tensors[i] for i in members]
        rows = index.to(own[0].device, non_blocking=True)
        if backend_for(own[0]) == "triton":
            # Triton is imported only where it is used.
            from tokenprune_kernels.kv_compact.fused import kv_compact_fused

            made = kv_compact_fused(own, rows, inplace=inplace)
        else:
            made = kv_compact_plain(own, rows, inplace=inplace)
        for i, tensor in zip(members, made, strict=True):
            out[i] = tensor
    return out
