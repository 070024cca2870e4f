"""Von Neumann entropy of the tokens' Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.estimators.base import SpectralEstimator, density, entropy


@dataclass(frozen=True)
class VonNeumann(SpectralEstimator):
    """H = - sum lambda log lambda / log m, lambda the m = min(n, D) eigenvalues of Z Z^T / tr(Z Z^T).

    Paper: EntropyPrune, arXiv 2602.17196; matrix entropy after Giraldo et al., arXiv 1211.2459.
    Range: [0, 1]; 0 for tokens on one line, 1 for an even spectrum.
    Cost: n D m for the Gram matrix and m^3 for its eigenvalues.
    Blind to: rotations, the order of tokens and their scale; noise that fills small
    directions counts as diversity.
    """

    name: ClassVar[str] = "von_neumann"
    paper: ClassVar[str] = "arXiv 2602.17196"

    def of_spectrum(self, eigenvalues: Tensor) -> Tensor:
        return entropy(density(eigenvalues)) / math.log(max(2, eigenvalues.shape[-1]))
