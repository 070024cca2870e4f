"""Triton backend: all tensors of a group in one launch. See kernels/README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Bytes of one tile: a program has this much in flight.
TILE_BYTES = 16384
#: Elements an address is a multiple of, where it is: lets the compiler use 16-byte accesses.
ALIGNED_BYTES = 16


@torch.no_grad()
def kv_compact_fused(tensors: Sequence[Tensor], index: Tensor, *, inplace: bool = False) -> list[Tensor]:
    """Keep rows ``index`` of tensors of one shape, dtype, strides and device, in one launch.

    Arguments and result are those of :func:`tokenprune_kernels.kv_compact.kv_compact`, which has checked them.
    """
    B, H, _, D = tensors[0].shape
    M = index.shape[1]
    if inplace:
        out = [tensor[:, :, :M] for tensor in tensors]
    else:
        # One allocation: the results' addresses are then known without a second table.
        out = list(tensors[0].new_empty(len(tensors), B, H, M, D).unbind(0))
    if not out[0].numel():
        return out
    size = tensors[0].element_size()
    # Where the tensors lie, counted in elements from the first.
    base = tensors[0].data_ptr()
    offsets = [(tensor.data_ptr() - base) // size for tensor in tensors]
    places = torch.tensor(offsets).to(index.device, non_blocking=True)
    strides = tensors[0].stride()
    vector = ALIGNED_BYTES // size
    aligned = base % ALIGNED_BYTES == 0 and strides[3] == 1
    aligned = aligned and not any(n % vector for n in (*offsets, *strides[:3], D))
    block_d = triton.next_power_of_2(D)
    rows = max(1, TILE_BYTES // (block_d * size))
    rows = min(rows, triton.next_power_of_2(M))
    grid = (len(tensors) * B * H * (1 if inplace else triton.cdiv(M, rows)),)
    with torch.cuda.device_of(index):
        _compact[grid](
            _bits(tensors[0]), _bits(out[0]), index.contiguous(), places, B, M, *strides,
            HEADS=H, D=D, BLOCK_M=rows, BLOCK_D=block_d, VECTOR=vector if aligned else 1, INPLACE=inplace,
            num_warps=4,
        )  # fmt: skip
    return out


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, which no arithmetic unit touches."""
    return tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


@triton.jit
def _compact(
    source, target, index, places, B, M, stride_b, stride_h, stride_n, stride_d,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr, INPLACE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one (tensor, row, head); in place, all tiles of it in ascending order."""
    program = tl.program_id(0)
    if INPLACE:
        tiles, tile, one = tl.cdiv(M, BLOCK_M), 0, program
    else:
        per = tl.cdiv(M, BLOCK_M)
        tiles, tile, one = 1, program % per, program // per
    head = one % HEADS
    b = (one // HEADS) % B
    place = tl.load(places + one // HEADS // B)
    # These are multiples of VECTOR, which the compiler cannot see: it picks the width of an access by it.
    place = tl.multiple_of(place, VECTOR)
    across = tl.multiple_of(b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h, VECTOR)
    column = tl.arange(0, BLOCK_D)
    own = source + (place + across)
    for step in range(tiles):
        m = (tile + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        kept = tl.load(index + b.to(tl.int64) * M + m, m < M, -1)
        inside = (kept[:, None] >= 0) & (column[None, :] < D)
        row = tl.multiple_of(kept * stride_n, (VECTOR,))
        values = tl.load(own + row[:, None] + column[None, :] * stride_d, inside, 0)
        written = (m[:, None] < M) & (column[None, :] < D)
        if INPLACE:
            tl.debug_barrier()  # what one warp overwrites, no other may still have to read
            to = tl.multiple_of(m.to(tl.int64) * stride_n, (VECTOR,))
            tl.store(own + to[:, None] + column[None, :] * stride_d, values, written)
        else:
            to = (one.to(tl.int64) * M + m) * D
            tl.store(target + to[:, None] + column[None, :], values, written)
