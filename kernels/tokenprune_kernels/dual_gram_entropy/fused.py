"""Triton backend: one program per token, from its states to its entropy, without eigenvalues. See kernels/README.md."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune_kernels.dual_gram_entropy.arguments import RELEASE_COLUMNS, Normalization, Order
from tokenprune_kernels.dual_gram_entropy.quadrature import NODES, coefficients

#: One warp per token, however many heads: with more, every sum over heads goes through shared memory, at 1.5 to 2 times
#: the time (kernels/README.md).
WARPS = 1


@torch.no_grad()
def dual_gram_entropy_fused(
    x: Tensor, *, normalization: Normalization = "none", column_groups: bool = False, order: Order = 1
) -> Tensor:
    """Matrix entropy of each token, (..., h, d) -> (...,) float32, in one launch.

    Arguments, result and error bound are those of :func:`tokenprune_kernels.dual_gram_entropy.dual_gram_entropy`,
    which has checked them. Arithmetic is float32: a token's squared states must be float32 numbers.
    """
    h, d = x.shape[-2:]
    H = x.new_empty(x.shape[:-2], dtype=torch.float32)
    if not H.numel():
        return H
    # At most two leading dimensions, so that (batch, heads, tokens, d) seen as (batch, tokens, heads, d) is not copied.
    rows = x if x.ndim == 4 else x.reshape(1, -1, h, d) if x.ndim != 3 else x[None]
    tokens = rows.shape[1]
    groups = d // RELEASE_COLUMNS if column_groups else 1
    block = max(16, triton.next_power_of_2(h))
    table, b1, b2 = _table(x.device)
    with torch.cuda.device_of(x):
        _entropy[(rows.shape[0] * tokens,)](
            rows, H, table, tokens, *rows.stride(), b1, b2, LOG_HEADS=math.log(h),
            HEADS=h, COLUMNS=d // groups, GROUPS=groups, BLOCK_H=block, BLOCK_D=64 if block <= 32 else 32,
            NODES=len(NODES), TRACE=normalization == "trace", ORDER=order, num_warps=WARPS,
        )  # fmt: skip
    return H


@cache
def _table(device: torch.device) -> tuple[Tensor, float, float]:
    """The nodes and their weights, (2, NODES) float32 on a device, and b1, b2."""
    c, b1, b2, _ = coefficients()
    table = torch.from_numpy(np.stack([NODES, c]).astype(np.float32))
    return table.to(device, non_blocking=True), b1, b2


@triton.jit
def _entropy(
    x, H, table, tokens, stride_b, stride_n, stride_h, stride_d, b1, b2,
    LOG_HEADS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, NODES: tl.constexpr, TRACE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    own = x + (token // tokens).to(tl.int64) * stride_b + (token % tokens).to(tl.int64) * stride_n
    head = tl.arange(0, BLOCK_H)
    gram = tl.zeros((BLOCK_H, BLOCK_H), tl.float32)
    for start in range(0, COLUMNS, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        states = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        first = tl.zeros((BLOCK_D,), tl.float32)
        for j in range(GROUPS):  # the release's column groups; 1: the columns themselves
            at = (column * GROUPS + j) * stride_d
            inside = (head[:, None] < HEADS) & (column[None, :] < COLUMNS)
            states += tl.load(own + head[:, None] * stride_h + at[None, :], inside, 0.0).to(tl.float32)
            first += tl.load(own + at, column < COLUMNS, 0.0).to(tl.float32)
        # Against the first head before against the mean: heads that are equal then leave exact zeros, and a common
        # mean that is large against the differences costs no digits.
        states = tl.where(head[:, None] < HEADS, states - first[None, :], 0.0) / GROUPS
        states = tl.where(head[:, None] < HEADS, states - tl.sum(states, 0)[None, :] / HEADS, 0.0)
        # Exact products: tf32's rounding would fill the small eigenvalues of a token of almost one direction.
        gram += tl.dot(states, tl.trans(states), input_precision="ieee")
    gram = gram / HEADS

    diagonal = tl.sum(tl.where(head[:, None] == head[None, :], gram, 0.0), 0)
    trace = tl.sum(diagonal, 0)
    gram = gram / tl.where(trace == 0.0, 1.0, trace)
    scale = 1.0 if TRACE else trace
    if ORDER == 2:
        # The sum of squared eigenvalues alone: the squared Frobenius norm.
        squares = tl.sum(tl.sum(gram * gram, 0), 0)
        floor = LOG_HEADS - 46.0517018599  # log (h 1e-20)
        log_squares = tl.log(tl.where(trace == 0.0, 1.0, squares)) + 2 * tl.log(
            tl.where(trace == 0.0, 1.0, scale)
        )
        # Not tl.maximum: it may drop a NaN.
        entropy = -tl.where((log_squares < floor) | (trace == 0.0), floor, log_squares)
    else:
        # With lambda = trace * x and sum x = 1:  - sum lambda log lambda = trace (- sum x log x - log trace).
        total = _minus_x_log_x(gram, head, table, b1, b2, HEADS, NODES)
        entropy = scale * (total - tl.log(tl.where(trace == 0.0, 1.0, scale)))
        entropy = tl.where(
            trace == 0.0, HEADS * 2.302585093e-09, entropy
        )  # every eigenvalue on the floor of 1e-10
    if TRACE:
        entropy = tl.where(trace == 0.0, 0.0, entropy)  # heads all equal: nothing to divide by
    tl.store(H + token, entropy / LOG_HEADS)


@triton.jit
def _minus_x_log_x(gram, head, table, b1, b2, HEADS: tl.constexpr, NODES: tl.constexpr):
    """Sum of -x log x over the eigenvalues x of a symmetric matrix of trace 1, as `quadrature.py` has it.

    Householder's reflections make it tridiagonal, a row at a time (Golub and Van Loan, Algorithm 8.3.1); as soon as
    row k is, the pivots q of T + t and their derivatives in t take one more step for every node t at once:

        q_k = d_k + t - e_k^2 / q_(k-1),   q_k' = 1 + e_k^2 q_(k-1)' / q_(k-1)^2,   tr (T + t)^-1 = sum q_k' / q_k

    All terms of q' are positive. Added up is sum (1 - t q'/q) = sum x / (x + t) and not the trace: the difference of h
    and t times a sum near h / t would leave nothing of small eigenvalues.
    """
    node = tl.arange(0, NODES)
    t = tl.load(table + node)
    c = tl.load(table + NODES + node)
    q = tl.full((NODES,), 1.0, tl.float32)
    dq = tl.zeros((NODES,), tl.float32)
    resolvents = tl.zeros((NODES,), tl.float32)
    e2 = 0.0
    squares = 0.0
    for k in range(HEADS):
        row = tl.sum(tl.where(head[:, None] == k, gram, 0.0), 0)  # or column: it is symmetric
        d = tl.sum(tl.where(head == k, row, 0.0), 0)
        squares += d * d + 2 * e2
        off = e2 / q
        dq = 1 + off * dq / q
        q = d + t - off
        resolvents += 1 - t * (dq / q)

        # The reflection that takes row k beyond k + 1 to zero: I - beta v v^T.
        tail = tl.where(head > k + 1, row, 0.0)
        beyond = tl.sum(tail * tail, 0)
        next_to = tl.sum(tl.where(head == k + 1, row, 0.0), 0)
        e2 = beyond + next_to * next_to
        edge = next_to + tl.where(next_to < 0, -tl.sqrt(e2), tl.sqrt(e2))
        length = beyond + edge * edge
        # Nothing to reflect: already zero, as in the last rows.
        beta = tl.where(length > 1e-30, 2 / tl.where(length > 1e-30, length, 1.0), 0.0)
        v = tl.where(head == k + 1, edge, tail)
        p = beta * tl.sum(gram * v[:, None], 0)
        w = p - (0.5 * beta * tl.sum(p * v, 0)) * v
        gram -= v[:, None] * w[None, :] + w[:, None] * v[None, :]
    return tl.sum(c * resolvents, 0) + b1 + b2 * squares
