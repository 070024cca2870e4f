"""Effective rank: the exponential of the spectrum's entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.estimators.base import SpectralEstimator, density, entropy


@dataclass(frozen=True)
class EffectiveRank(SpectralEstimator):
    """erank = exp(- sum lambda log lambda), lambda the eigenvalues of Z Z^T / tr(Z Z^T).

    Paper: Roy and Vetterli, "The effective rank", EUSIPCO 2007, with eigenvalues (squared singular values) as the
    distribution, as in EntropyPrune, arXiv 2602.17196.
    Range: 1 to min(n, D): how many directions an even spectrum would have.
    Cost: as the von Neumann entropy, of which it is a monotone function for given n and D.
    Blind to: the same; it stretches differences between diverse sets and shrinks those between poor ones.
    """

    name: ClassVar[str] = "effective_rank"
    paper: ClassVar[str] = "Roy and Vetterli, EUSIPCO 2007"

    def of_spectrum(self, eigenvalues: Tensor) -> Tensor:
        return entropy(density(eigenvalues)).exp()
