"""Sums over eigenvalues without eigenvalues, in plain PyTorch: the kernel's method, tokens along the last dimension.

Every operation runs over all tokens at once on contiguous memory; LAPACK takes one small matrix after the other, and on
CUDA waits for the device.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tokenprune_kernels.dual_gram_entropy.quadrature import NODES, coefficients


def minus_x_log_x(A: Tensor) -> Tensor:
    """Sum of ``-x log x`` over the eigenvalues x of symmetric matrices of trace 1, float32.

    Householder's reflections and the pivots' recurrence are those of ``fused.py``, where they are explained.

    Args:
        A: (h, h, n), float32. n matrices, the token last. Overwritten.

    Returns:
        Tensor, shape (n,), float32
    """
    h, _, n = A.shape
    t, c, b1, b2 = _nodes(A.device)
    q, dq = A.new_ones(len(t), n), A.new_zeros(len(t), n)
    resolvents = A.new_zeros(len(t), n)
    e2, squares = A.new_zeros(n), A.new_zeros(n)
    for k in range(h):
        d = A[k, k]
        squares += d * d + 2 * e2
        off = e2 / q
        dq = 1 + off * dq / q
        q = d + t - off
        resolvents += 1 - t * (dq / q)
        if k >= h - 2:  # nothing beyond the next column
            e2 = A[k, h - 1].square()
            continue
        row = A[k, k + 1 :]
        beyond = row[1:].square().sum(0)
        e2 = beyond + row[0].square()
        edge = row[0] + torch.copysign(e2.sqrt(), row[0])
        length = beyond + edge.square()
        beta = torch.where(length > 1e-30, 2 / length, 0.0)
        v = row.clone()
        v[0] = edge
        rest = A[k + 1 :, k + 1 :]
        p = beta * (rest * v[:, None]).sum(0)
        w = p - (0.5 * beta * (p * v).sum(0)) * v
        rest.addcmul_(v[:, None], w[None], value=-1).addcmul_(w[:, None], v[None], value=-1)
    return (c * resolvents).sum(0) + b1 + b2 * squares


@cache
def _nodes(device: torch.device) -> tuple[Tensor, Tensor, float, float]:
    c, b1, b2, _ = coefficients()
    t = torch.from_numpy(NODES).float()[:, None].to(device, non_blocking=True)
    return t, torch.from_numpy(c).float()[:, None].to(device, non_blocking=True), b1, b2
