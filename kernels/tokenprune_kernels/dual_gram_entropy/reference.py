"""The truth: token-wise matrix entropy in float64, straight from the formula.

Source: EntropyPrune, arXiv 2602.17196, and its released code. Symbols are the paper's. Nothing here is fast; every
backend beside this file is held to it.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from tokenprune_kernels.dual_gram_entropy.arguments import (
    EIGENVALUE_FLOOR,
    Normalization,
    average_column_groups,
    check_arguments,
)

Gram = Literal["dual", "primal"]


def spectrum(
    x: Tensor, *, normalization: Normalization = "none", gram: Gram = "dual", column_groups: bool = False
) -> Tensor:
    """The h eigenvalues behind the entropy, clamped, ascending.

    ``gram="dual"`` takes them from ``X X^T / h`` (h x h), ``gram="primal"`` from ``X^T X / h`` (d x d). The two share
    their ``min(h, d)`` largest eigenvalues and differ only by zeros, yet every zero clamps to 1e-10 and then counts.
    So the primal spectrum is cut to its ``min(h, d)`` largest and filled with zeros up to h: both then agree to
    float64 rounding, and both are the released code's, which is dual.

    Centring is done in float64. The released code subtracts the mean in the model's dtype and goes to float64 after,
    which puts the rounding of a 16-bit subtraction on its eigenvalues; that is not reproduced.

    Parameters and errors are those of :func:`matrix_entropy`.

    Returns:
        Tensor, shape (..., h), float64. All NaN for a token that holds a NaN or an infinity. With
        ``normalization="trace"`` a token of zero trace has every eigenvalue at the clamp.
    """
    check_arguments(x, normalization=normalization, column_groups=column_groups)
    X = _centred(x, column_groups)
    h, d = X.shape[-2:]
    A = _gram(X, gram)
    trace = A.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    # LAPACK may refuse a whole batch for one NaN, so such tokens are solved as zeros and marked afterwards.
    finite = trace.isfinite()
    lam = torch.linalg.eigvalsh(torch.where(finite[..., None, None], A, 0.0))[..., -min(h, d) :]
    lam = torch.cat([lam.new_zeros(*lam.shape[:-1], h - lam.shape[-1]), lam], dim=-1)
    if normalization == "trace":
        lam = lam / torch.where(trace > 0, trace, 1.0)[..., None]
    return torch.where(finite[..., None], lam.clamp_min(EIGENVALUE_FLOOR), torch.nan)


def _centred(x: Tensor, column_groups: bool) -> Tensor:
    X = x.detach().double()
    if column_groups:
        X = average_column_groups(X)
    return X - X.mean(dim=-2, keepdim=True)


def _gram(X: Tensor, gram: Gram) -> Tensor:
    if gram == "dual":
        return X @ X.mT / X.shape[-2]
    if gram == "primal":
        return X.mT @ X / X.shape[-2]
    raise ValueError(f"gram must be 'dual' or 'primal', got {gram!r}")


def renyi2_entropy(
    x: Tensor, *, normalization: Normalization = "none", gram: Gram = "dual", column_groups: bool = False
) -> Tensor:
    """``H2 = -log(max(sum lambda^2, h 1e-20)) / log h`` of each token, sum lambda^2 being the squared Frobenius norm.

    Parameters, result and errors are those of :func:`matrix_entropy`, whose floor of 1e-10 for an eigenvalue is here
    one for their sum of squares.
    """
    check_arguments(x, normalization=normalization, column_groups=column_groups)
    A = _gram(_centred(x, column_groups), gram)
    h = x.shape[-2]
    trace = A.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    if normalization == "trace":
        A = A / torch.where(trace > 0, trace, 1.0)[..., None, None]
    squares = A.square().sum(dim=(-2, -1))
    H = -squares.clamp_min(h * EIGENVALUE_FLOOR**2).log() / math.log(h)
    if normalization == "trace":
        H = torch.where(trace == 0, 0.0, H)
    return torch.where(trace.isfinite(), H, torch.nan)


def matrix_entropy(
    x: Tensor, *, normalization: Normalization = "none", gram: Gram = "dual", column_groups: bool = False
) -> Tensor:
    """``H = -sum lambda log lambda / log h`` of each token.

    Args:
        x: (..., h, d). One matrix per token: heads as rows, head channels as columns. Any real floating dtype.
        normalization: {"none", "trace"} (default "none"). ``"none"``: the eigenvalues as they are (released code).
            ``"trace"``: ``A / tr(A)`` first (von Neumann). A token of zero trace, its heads all equal, has no such
            matrix: ``H = 0`` by definition here.
        gram: {"dual", "primal"} (default "dual"). Which Gram matrix gives the eigenvalues, see :func:`spectrum`.
        column_groups: bool (default False). Average groups of ``d / 128`` neighbouring columns first (released code).
            ``d`` must be a multiple of 128.

    Returns:
        Tensor, shape (...,), float64. NaN for a token that holds a NaN or an infinity.

    Raises:
        TypeError: ``x`` is not a tensor of real floating numbers.
        ValueError: Fewer than two dimensions, ``h < 2``, ``d < 1``, a ``d`` that ``column_groups`` refuses, or an
            unknown name.
    """
    lam = spectrum(x, normalization=normalization, gram=gram, column_groups=column_groups)
    H = -(lam * lam.log()).sum(dim=-1) / math.log(x.shape[-2])
    if normalization == "trace":
        # A matrix of trace 1 has an eigenvalue of at least 1/h.
        no_trace = (lam == EIGENVALUE_FLOOR).all(dim=-1)
        H = torch.where(no_trace, 0.0, H)
    return H


def error_scale(x: Tensor, *, normalization: Normalization = "none", column_groups: bool = False) -> Tensor:
    """``sum |lambda log lambda| / log h``: what errors of ``H`` are measured against.

    Not ``|H|``: without trace normalisation the terms have both signs (lambda above and below 1) and ``H`` crosses 0.

    Parameters and errors are those of :func:`matrix_entropy`. Always positive, or NaN where ``H`` is.

    Returns:
        Tensor, shape (...,), float64
    """
    lam = spectrum(x, normalization=normalization, column_groups=column_groups)
    return (lam * lam.log()).abs().sum(dim=-1) / math.log(x.shape[-2])
