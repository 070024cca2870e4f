"""What an estimator of diversity is: a token matrix in, one number out, larger is more diverse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError

_CHUNK = 2**25  # elements of a copy of the tokens that are held at once


@dataclass(frozen=True)
class Estimator(ABC):
    """Base of all estimators. Parameters are dataclass fields, checked in `__post_init__`.

    Class attributes:
        name: what users type.
        paper: where it comes from.
        spectral: whether it is a function of the eigenvalues of the tokens' Gram matrix alone.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    spectral: ClassVar[bool] = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Estimate the diversity of token sets.

        Args:
            tokens: (..., n, D), n >= 2, as they are: `prepare` centres and normalises them first where that is
                wanted, and `estimate` does both. Float64 is computed in float64; anything else in float32, except
                where that is not enough.

        Returns:
            (...) of the tokens' device: float64 for float64, else float32. NaN for a set with a NaN or an infinity.

        Raises:
            ConfigError: not a floating tensor of at least two dimensions, or fewer than two tokens.
        """
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point() or tokens.ndim < 2:
            raise ConfigError("an estimator takes a floating tensor (..., tokens, width)")
        if tokens.shape[-2] < 2 or tokens.shape[-1] < 1:
            raise ConfigError(f"diversity needs at least two tokens, not a {tuple(tokens.shape)} tensor")
        dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        flat = tokens.detach().reshape(-1, *tokens.shape[-2:])
        values = []
        n, d = tokens.shape[-2:]
        for one in flat.split(max(1, _CHUNK // (n * max(n, d)))):
            finite = one.isfinite().flatten(1).all(1)
            if not bool(finite.all()):  # LAPACK may refuse a whole batch for one NaN
                one = torch.where(finite[:, None, None], one, 0)
            with torch.autocast(tokens.device.type, enabled=False):
                value = self._estimate(one)
            values.append(value.to(dtype).masked_fill(~finite, torch.nan))
        return torch.cat(values).reshape(tokens.shape[:-2])

    @abstractmethod
    def _estimate(self, tokens: Tensor) -> Tensor:
        """(b, n, D) finite -> (b,)."""


@dataclass(frozen=True)
class SpectralEstimator(Estimator):
    """A function of the eigenvalues lambda of K = Z Z^T / n, Z the (n, D) tokens.

    They are taken from the smaller of Z Z^T / n (n x n) and Z^T Z / n (D x D), which differ only by zeros.
    """

    spectral: ClassVar[bool] = True
    exact: ClassVar[bool] = False  # whether float32 is not enough for the Gram matrix

    def _estimate(self, tokens: Tensor) -> Tensor:
        return self.of_spectrum(spectrum(tokens, exact=self.exact))

    @abstractmethod
    def of_spectrum(self, eigenvalues: Tensor) -> Tensor:
        """From the min(n, D) largest eigenvalues (..., m), in any order, none negative: (...)."""


def prepare(tokens: Tensor, eps: float = 1e-6) -> Tensor:
    """Centre tokens over the set and scale each to length 1, so that tr(Z Z^T / n) = 1.

    Args:
        tokens: (n, D) of one set.
        eps: tokens closer to the mean than this share of the longest token's length are left out.

    Returns:
        (n', D), n' <= n, float64 for float64 and float32 otherwise.
    """
    z = tokens if tokens.dtype == torch.float64 else tokens.float()
    length = z.norm(dim=1).amax() if len(z) else 0
    z = z - z.mean(0, keepdim=True)
    norm = z.norm(dim=1, keepdim=True)
    whole = norm[:, 0] > eps * length
    if not bool(whole.all()):
        z, norm = z[whole], norm[whole]
    return z / norm


def spectrum(tokens: Tensor, *, exact: bool = False) -> Tensor:
    """The min(n, D) eigenvalues of Z Z^T / n, ascending, rounding below zero clamped.

    Args:
        tokens: (..., n, D).
        exact: form the Gram matrix in float64 whatever the tokens' dtype; wanted where small eigenvalues count.

    Returns:
        (..., min(n, D)), float64.
    """
    return torch.linalg.eigvalsh(small_gram(tokens, exact=exact).double()).clamp(min=0)


def small_gram(tokens: Tensor, *, exact: bool = False) -> Tensor:
    """The smaller of Z Z^T / n and Z^T Z / n, in float64 or float32, from tokens (..., n, D) taken in chunks.

    Memory beyond the result: a chunk of about 2^25 elements in the arithmetic's dtype, whatever n and D are.
    """
    n, d = tokens.shape[-2:]
    dtype = torch.float64 if exact or tokens.dtype == torch.float64 else torch.float32
    sets = max(1, math.prod(tokens.shape[:-2]))
    m = min(n, d)
    gram = torch.zeros(*tokens.shape[:-2], m, m, dtype=dtype, device=tokens.device)
    # Summed over the longer dimension, a chunk of it at a time.
    step = max(1, _CHUNK // (sets * m))
    for part in tokens.split(step, dim=-1 if n <= d else -2):
        part = part.to(dtype)
        gram += part @ part.mT if n <= d else part.mT @ part
    return gram / n


def is_positive(value: object) -> bool:
    """Whether a parameter is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def density(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues (..., m) over their sum, so that entropies hold on raw tokens too; NaN for tokens all zero."""
    return eigenvalues / eigenvalues.sum(-1, keepdim=True)


def entropy(p: Tensor) -> Tensor:
    """- sum p log p over the last dimension, 0 log 0 = 0."""
    return -torch.special.xlogy(p, p).sum(-1)
