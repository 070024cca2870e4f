"""Nuclear norm of the token matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.estimators.base import SpectralEstimator


@dataclass(frozen=True)
class NuclearNorm(SpectralEstimator):
    """||Z||_* / sqrt(n) = sum sqrt(lambda), lambda the eigenvalues of Z Z^T / n.

    Paper: the manifold-capacity measure of "Learning Efficient Coding of Natural Images with Maximum Manifold
    Capacity Representations", arXiv 2303.03307.
    Range: 1 to sqrt(min(n, D)) on prepared tokens (trace 1).
    Cost: as the von Neumann entropy.
    Blind to: rotations and order. Square roots lift small eigenvalues, so it is the one most moved by noise, and its
    Gram matrix is formed in float64 whatever the tokens are in.
    """

    name: ClassVar[str] = "nuclear_norm"
    paper: ClassVar[str] = "arXiv 2303.03307"
    exact: ClassVar[bool] = True

    def of_spectrum(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.sqrt().sum(-1)
