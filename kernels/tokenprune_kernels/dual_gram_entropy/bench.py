"""Times the backends against the released form.

The released form is ``reference.matrix_entropy``: float64 throughout, all tokens in one piece, always the dual Gram, by
``torch.linalg.eigvalsh``. ``graph_us`` is a replay from a graph, which leaves launch costs out.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch

from tokenprune_kernels.dual_gram_entropy import dual_gram_entropy
from tokenprune_kernels.dual_gram_entropy.arguments import Normalization, Order
from tokenprune_kernels.dual_gram_entropy.reference import error_scale, matrix_entropy, renyi2_entropy
from tokenprune_kernels.machine import describe_device
from tokenprune_kernels.timing import cuda_ms, interleaved_ms

#: (tokens, heads, head_dim): LLaVA-1.5-7B, LLaVA-1.6-7B, a tiny test model, a 1k-wide model, Qwen2.5-VL-7B, h > d.
SHAPES = ["576x32x128", "2880x32x128", "144x4x32", "576x16x64", "1024x28x128", "576x64x32"]
GROWTH = [f"{n}x32x128" for n in (512, 2048, 8192, 32768)]


def measure(
    shape: str,
    normalization: Normalization,
    order: Order,
    repeats: int,
    device: str,
    with_reference: bool = True,
) -> dict[str, str]:
    """Time one shape, ``"tokens x heads x head_dim"``, on bf16 gaussian query states in the layout attention has."""
    n, h, d = (int(size) for size in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    # (batch, heads, tokens, d) transposed, as it comes out of a model
    x = torch.randn(1, h, n, d, generator=generator).to(device, torch.bfloat16).transpose(1, 2)
    exact = partial(matrix_entropy if order == 1 else renyi2_entropy, x, normalization=normalization)
    fast = partial(dual_gram_entropy, x, normalization=normalization, order=order)
    graph = ""
    if device == "cuda":
        ms = cuda_ms(fast)
        graph = f"{1e3 * cuda_ms(fast, repeats=20, replays=20):.4g}"
        reference = cuda_ms(exact, repeats=5) if with_reference else 0.0
    elif with_reference:
        reference, ms = interleaved_ms([exact, fast], repeats)
    else:
        reference, (ms,) = 0.0, interleaved_ms([fast], repeats)
    error = ""
    if with_reference:
        scale = (
            1e-2 * (1 + exact().abs())
            if order == 2
            else error_scale(x, normalization=normalization).clamp(min=0.01)
        )
        error = f"{((fast().double() - exact()).abs() / scale).max().item():.1e}"
    return {
        "shape": shape,
        "normalization": normalization,
        "order": str(order),
        "reference_ms": f"{reference:.4g}" if with_reference else "",
        "ours_ms": f"{ms:.4g}",
        "graph_us": graph,
        "speedup": f"{reference / max(ms, 1e-6):.3g}" if with_reference else "",
        "us_per_token": f"{1e3 * ms / n:.3g}",
        "error": error,  # |H - H64| over what 1e-3 of is promised
        **describe_device(device),
    }


def rows(options: Namespace) -> Iterator[dict[str, str]]:
    """Of `tokenprune_kernels.bench`: every shape, both normalisations and orders; with `growth` one form, longer."""
    normalizations: tuple[Normalization, ...] = ("none", "trace")
    orders: tuple[Order, ...] = (1, 2)
    cells = [
        (s, norm, order) for s in options.shapes or SHAPES for norm in normalizations for order in orders
    ]
    if options.growth:
        cells = [(s, "none", 1) for s in GROWTH]
    for cell in cells:
        yield measure(*cell, options.repeats, options.device, with_reference=not options.growth)
