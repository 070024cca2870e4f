"""Plain PyTorch backend: the smaller Gram matrix, in chunks of tokens, and its spectrum in one of two ways.

float64 states, and matrices of up to 8 x 8, get float64 eigenvalues; all others float32 resolvents (`resolvents.py`),
which are up to twice as fast on a CPU. kernels/README.md has the numbers, and those of what was tried instead.
"""

import math

import torch
from torch import Tensor

from tokenprune_kernels.dual_gram_entropy.arguments import (
    EIGENVALUE_FLOOR,
    Normalization,
    Order,
    average_column_groups,
)
from tokenprune_kernels.dual_gram_entropy.resolvents import minus_x_log_x

#: Temporaries per chunk: what stays in a CPU's cache and still has enough tokens for long vectors; elsewhere fewer
#: launches matter more, and this only keeps 32k tokens from filling the memory.
CPU_CHUNK_BYTES = 16 * 2**20
DEVICE_CHUNK_BYTES = 64 * 2**20
#: Where LAPACK takes a microsecond or two per matrix, the resolvents' many small operations do not pay.
SMALL = 8


@torch.no_grad()
def dual_gram_entropy_plain(
    x: Tensor,
    *,
    normalization: Normalization = "none",
    column_groups: bool = False,
    order: Order = 1,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Matrix entropy of each token, (..., h, d) -> (...,) float32.

    Arguments and result are those of :func:`tokenprune_kernels.dual_gram_entropy.dual_gram_entropy`, which has
    checked them, and:

    Args:
        chunk_bytes: int, optional. Bound on the temporaries, but at least one token is taken at a time. The result
            does not depend on it. Default: 16 MiB on a CPU, 64 MiB elsewhere.

    Raises:
        RuntimeError: For float64, or up to 8 heads or columns: the device cannot hold float64, or (CUDA)
            synchronisation is set to raise: ``torch.linalg.eigvalsh`` reads its convergence flags back.
    """
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if x.device.type == "cpu" else DEVICE_CHUNK_BYTES
    H = x.new_empty(x.shape[:-2], dtype=torch.float32)
    _fill(H, x, normalization, column_groups, order, chunk_bytes)
    return H


def _fill(
    H: Tensor, x: Tensor, normalization: Normalization, column_groups: bool, order: Order, chunk_bytes: int
) -> None:
    """Write the entropies of x, (..., h, d), into H, (...,), a contiguous tensor."""
    h, d = x.shape[-2:]
    try:
        tokens = x.view(-1, h, d)
    except RuntimeError:
        # (batch, heads, tokens, d) seen as (batch, tokens, heads, d): the two leading dimensions do not merge, and
        # a reshape would copy all of x. Walk the first one instead.
        for H_row, x_row in zip(H, x, strict=True):
            _fill(H_row, x_row, normalization, column_groups, order, chunk_bytes)
        return
    exact = x.dtype == torch.float64 or min(h, d) <= SMALL
    # The matrix and its copies; the Gram and the solver's two copies of it.
    elements = (3 if column_groups else 2) * h * d + 3 * min(h, d) ** 2
    bytes_per_token = (8 if exact else 4) * elements
    step = max(1, chunk_bytes // bytes_per_token)
    H_flat = H.view(-1)
    for start in range(0, tokens.shape[0], step):
        part = tokens[start : start + step]
        if exact or order == 2:
            H_flat[start : start + step] = _by_eigenvalues(part, normalization, column_groups, order)
        else:
            H_flat[start : start + step] = _by_resolvents(part, normalization, column_groups)


def _by_resolvents(x: Tensor, normalization: Normalization, column_groups: bool) -> Tensor:
    """(n, h, d) -> (n,) float32, all tokens at once, of order 1."""
    X = x.float()
    if column_groups:
        X = average_column_groups(X)
    h, d = X.shape[-2:]
    # Against the first head before against the mean: heads that are equal then leave exact zeros, and a common mean
    # that is large against the differences costs no digits.
    X = X - X[:, :1]
    X -= X.mean(dim=-2, keepdim=True)
    G = torch.bmm(X, X.mT) if h <= d else torch.bmm(X.mT, X)
    A = G.permute(1, 2, 0).contiguous().div_(h)
    trace = A.diagonal().sum(dim=-1)
    scale = torch.where(trace == 0, 1.0, trace)
    H = minus_x_log_x(A.div_(scale))
    if normalization == "trace":
        H = torch.where(trace == 0, 0.0, H)
    else:
        # With lambda = trace x and sum x = 1:  - sum lambda log lambda = trace (- sum x log x - log trace).
        floor = -h * EIGENVALUE_FLOOR * math.log(EIGENVALUE_FLOOR)  # no trace: every eigenvalue is on it
        H = torch.where(trace == 0, floor, trace * (H - scale.log()))
    return torch.where(trace.isfinite(), H / math.log(h), torch.nan)


def _by_eigenvalues(x: Tensor, normalization: Normalization, column_groups: bool, order: Order) -> Tensor:
    """(n, h, d) -> (n,) float64, all tokens at once."""
    # A copy even when x is float64 already: the centring below is in place.
    X = x.to(torch.float64, copy=True)
    if column_groups:
        X = average_column_groups(X)
    h, d = X.shape[-2:]
    # Centred before the product. Double centring of the raw Gram is cheaper but leaves rounding where equal heads must
    # give exactly 0, and in float32 it fails outright on a large common mean.
    X -= X.mean(dim=-2, keepdim=True)
    # float64 for the product too: a float32 Gram carries 1e-7 of its largest eigenvalue into every small one, which is
    # more than the small ones hold for a token of almost one direction.
    G = torch.bmm(X, X.mT) if h <= d else torch.bmm(X.mT, X)
    trace = G.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    finite = trace.isfinite()
    scale = torch.where(trace > 0, trace, 1.0) if normalization == "trace" else torch.full_like(trace, h)
    if order == 2:
        # The squared Frobenius norm is the sum of squared eigenvalues. No floor but for a token of no spectrum.
        squares = G.square().sum(dim=(-2, -1)) / scale.square()
        H = -squares.clamp_min(h * EIGENVALUE_FLOOR**2).log() / math.log(h)
        if normalization == "trace":
            H = torch.where(trace > 0, H, 0.0)
        return torch.where(finite, H, torch.nan)
    G.masked_fill_(~finite[:, None, None], 0.0)  # LAPACK may refuse a whole batch for one NaN
    lam = torch.linalg.eigvalsh(G)
    lam = (lam / scale[:, None]).clamp_min_(EIGENVALUE_FLOOR)
    # The primal Gram (h > d) lacks h - d of the dual's zeros, and each counts once clamped.
    missing = max(h - d, 0) * EIGENVALUE_FLOOR * math.log(EIGENVALUE_FLOOR)
    H = -((lam * lam.log()).sum(dim=-1) + missing) / math.log(h)
    if normalization == "trace":
        H = torch.where(trace > 0, H, 0.0)
    return torch.where(finite, H, torch.nan)
