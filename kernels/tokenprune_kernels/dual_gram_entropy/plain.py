"""Plain PyTorch backend: float64 eigenvalues of the smaller Gram matrix, in chunks of tokens.

Runs on any device with float64. kernels/README.md has the numbers of what was tried instead.
"""

import math

import torch
from torch import Tensor

from .arguments import EIGENVALUE_FLOOR, Normalization, Order, average_column_groups

#: Temporaries per chunk. On a CPU a chunk should stay in cache (2880 x 32 x 128: 209 ms, in one piece 279 ms);
#: elsewhere fewer launches matter more, and this only keeps 32k tokens from filling the memory.
CPU_CHUNK_BYTES = 4 * 2**20
DEVICE_CHUNK_BYTES = 64 * 2**20


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

    Parameters
    ----------
    chunk_bytes : int, optional
        Bound on the temporaries, but at least one token is taken at a time. The result does not depend on it.
        Default: 4 MiB on a CPU, 64 MiB elsewhere.

    Raises
    ------
    RuntimeError
        The device cannot hold float64, or (CUDA) synchronisation is set to raise: ``torch.linalg.eigvalsh`` reads its
        convergence flags back.
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
    # All float64: the matrix (twice with its column averages); the Gram and the solver's two copies of it.
    bytes_per_token = 8 * ((2 if column_groups else 1) * h * d + 3 * min(h, d) ** 2)
    step = max(1, chunk_bytes // bytes_per_token)
    H_flat = H.view(-1)
    for start in range(0, tokens.shape[0], step):
        H_flat[start : start + step] = _entropy(
            tokens[start : start + step], normalization, column_groups, order
        )


def _entropy(x: Tensor, normalization: Normalization, column_groups: bool, order: Order) -> Tensor:
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
