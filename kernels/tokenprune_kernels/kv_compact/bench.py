"""Times compaction against a plain copy.

On CUDA: all K and V of a cache in one launch, as bytes read and written over time, and the share of what a large copy
reaches on the same GPU. On a CPU: a smaller cache, against the copy of as many bytes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor

from tokenprune_kernels.kv_compact import kv_compact
from tokenprune_kernels.machine import describe_device
from tokenprune_kernels.timing import copy_bandwidth, cuda_ms, interleaved_ms

#: (layers, batch, heads, entries, head_dim): LLaVA-NeXT-7B's cache at batch 8; one that a CPU compacts in a moment.
SHAPES = {"cuda": (32, 8, 32, 2880, 128), "cpu": (4, 2, 8, 576, 64)}


def measure(shape: tuple[int, ...], kept: float, inplace: bool, device: str) -> dict[str, str]:
    """One line of the table: bf16, random rows."""
    layers, batch, heads, entries, width = shape
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(entries, generator=generator)[: int(kept * entries)] for _ in range(batch)]
    index = torch.stack([row.sort().values for row in rows]).to(device)
    size = (batch, heads, entries, width)
    tensors = [torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2 * layers)]
    moved = 2 * sum(t.nbytes for t in tensors) * index.shape[1] // entries

    def run() -> list[Tensor]:
        return kv_compact(tensors, index, inplace=inplace)

    if device == "cuda":
        ms, ceiling = cuda_ms(run, repeats=20), copy_bandwidth()
    else:
        source = torch.randn(moved // 4, device=device, dtype=torch.bfloat16)
        ms, copy_ms = interleaved_ms([run, source.clone], repeats=11)
        ceiling = moved / (1e-3 * copy_ms)
    speed = moved / (1e-3 * ms)
    return {
        "layers x batch x heads x entries x head_dim": "x".join(map(str, shape)),
        "kept": str(kept),
        "in_place": str(inplace),
        "ms": f"{ms:.4g}",
        "gb_per_s": f"{speed / 1e9:.4g}",
        "copy_gb_per_s": f"{ceiling / 1e9:.4g}",
        "share_of_copy": f"{speed / ceiling:.3f}",
        **describe_device(device),
    }


def rows(options: Namespace) -> Iterator[dict[str, str]]:
    """Of `tokenprune_kernels.bench`: every share, beside and in place."""
    for kept in options.kept:
        for inplace in (False, True):
            yield measure(SHAPES[options.device], kept, inplace, options.device)
