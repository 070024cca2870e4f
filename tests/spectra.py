"""Token matrices whose spectra are hard in different ways, for the tests of matrix entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rank_one(n: int, h: int, d: int) -> Tensor:
    return normal(n, h, 1) * normal(n, 1, d)


def unit_trace(x: Tensor) -> Tensor:
    x = x - x.mean(dim=-2, keepdim=True)
    return x / (x.square().sum(dim=(-2, -1), keepdim=True) / x.shape[-2]).sqrt()


def outlier_head(n: int, h: int, d: int) -> Tensor:
    x = normal(n, h, d)
    x[:, 0] *= 100
    return x


FAMILIES: dict[str, Callable[[int, int, int], Tensor]] = {
    "gaussian": normal,
    "low_rank_and_noise": lambda n, h, d: normal(n, h, 3) @ normal(n, 3, d) + 1e-2 * normal(n, h, d),
    "decaying": lambda n, h, d: normal(n, h, d) * torch.logspace(0, -3, h, dtype=torch.float64)[:, None],
    "outlier_head": outlier_head,
    "common_mean": lambda n, h, d: normal(n, h, d) + 1000 * normal(n, 1, d),
    "large": lambda n, h, d: 300 * normal(n, h, d),  # lambda >> 1
    "small": lambda n, h, d: 1e-3 * normal(n, h, d),  # lambda << 1
    "at_the_floor": lambda n, h, d: 1e-5 * normal(n, h, d),  # lambda around 1e-10
    "nearly_rank_one": lambda n, h, d: rank_one(n, h, d) + 1e-3 * normal(n, h, d),
    "rank_one": rank_one,  # what is left beside the first eigenvalue is the rounding of the dtype
    # The hardest: lambda_1 = 1 adds nothing to H, so all of it sits in eigenvalues of 1e-8.
    "one_and_dust": lambda n, h, d: unit_trace(rank_one(n, h, d)) + 1e-4 * normal(n, h, d),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ODD_SHAPES = [
    (1, 2, 1),
    (7, 3, 17),
    (1, 3, 100),
    (7, 5, 40),
    (1, 28, 100),
    (7, 33, 17),
    (7, 33, 40),
    (7, 33, 100),
]
SHAPES = [*ODD_SHAPES, (7, 4, 32), (7, 16, 64), (7, 28, 128), (7, 32, 128), (7, 64, 32)]
