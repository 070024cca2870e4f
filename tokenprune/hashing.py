"""A 64-bit integer hash in torch operations: the same on every device, no copy to the host."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN, _M1, _M2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> on int64 is arithmetic; the hash wants zeros shifted in.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele et al., OOPSLA 2014) element-wise on int64, wrapping around."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _M1
    x = (x ^ _shift_right(x, 27)) * _M2
    return x ^ _shift_right(x, 31)


def digest(x: Tensor, dim_from: int = 1) -> Tensor:
    """One int64 per leading index: an order-sensitive hash of the bits of all dimensions from `dim_from` on."""
    flat = x.reshape(*x.shape[:dim_from], -1)
    if flat.is_floating_point():
        flat = flat.float().view(torch.int32)
    flat = flat.long()
    place = torch.arange(flat.shape[-1], device=x.device)
    return mix((mix(flat) + place * _GOLDEN) * (2 * place + 1)).sum(-1)
