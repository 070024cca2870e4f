"""Renyi entropy of the tokens' Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.estimators.base import SpectralEstimator, density, entropy, is_positive, small_gram


@dataclass(frozen=True)
class Renyi(SpectralEstimator):
    """S_alpha = log(sum lambda^alpha) / ((1 - alpha) log m), lambda the m = min(n, D) eigenvalues of
    Z Z^T / tr(Z Z^T).

    Paper: Giraldo et al., "Measures of entropy from data using infinitely divisible kernels", arXiv 1211.2459.
    Range: [0, 1].
    Cost: alpha = 2 is - log (||Z Z^T||_F^2 / tr(Z Z^T)^2) / log m and needs no eigenvalues; otherwise as the von
    Neumann entropy, which is the limit alpha -> 1.
    Blind to: as the von Neumann entropy; the larger alpha, the less it sees of anything but the largest eigenvalues.

    Args:
        alpha: order, > 0; 1 is the von Neumann entropy.
    """

    name: ClassVar[str] = "renyi"
    paper: ClassVar[str] = "arXiv 1211.2459"

    alpha: float = 2.0

    def __post_init__(self) -> None:
        if not is_positive(self.alpha):
            raise ConfigError(f"alpha must be a number above 0, not {self.alpha!r}")

    def _estimate(self, tokens: Tensor) -> Tensor:
        if self.alpha != 2:
            return super()._estimate(tokens)
        gram = small_gram(tokens)
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        return -(gram.square().sum((-2, -1)) / trace.square()).log() / math.log(max(2, gram.shape[-1]))

    def of_spectrum(self, eigenvalues: Tensor) -> Tensor:
        size = math.log(max(2, eigenvalues.shape[-1]))
        p = density(eigenvalues)
        if self.alpha == 1:
            return entropy(p) / size
        return p.pow(self.alpha).sum(-1).log() / ((1 - self.alpha) * size)
