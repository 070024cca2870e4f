"""Condition number of the tokens' Gram matrix, on its numerical rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.estimators.base import SpectralEstimator

RANK_TOLERANCE = 1e-6  # eigenvalues below this share of the largest count as zero


@dataclass(frozen=True)
class ConditionNumber(SpectralEstimator):
    """- log(lambda_1 / lambda_r), r the number of eigenvalues of Z Z^T / n above 1e-6 lambda_1.

    Paper: arXiv 2506.16289. The plain ratio is infinite here: centring makes the smallest eigenvalue zero.
    Range: [log 1e-6, 0] = [-13.8, 0]; 0 for an even spectrum, and for one of rank one (a line of tokens is well
    conditioned, which is why it must be read beside another estimator). All tokens equal to zero: 0.
    Cost: as the von Neumann entropy, with the Gram matrix in float64: it hangs on the smallest eigenvalue that counts.
    Blind to: scale, rotations, order, and everything between the first eigenvalue and the last.
    """

    name: ClassVar[str] = "condition_number"
    paper: ClassVar[str] = "arXiv 2506.16289"
    exact: ClassVar[bool] = True

    def of_spectrum(self, eigenvalues: Tensor) -> Tensor:
        largest = eigenvalues.amax(-1, keepdim=True)
        counted = torch.where(eigenvalues > RANK_TOLERANCE * largest, eigenvalues, largest)
        ratio = counted.amin(-1) / torch.where(largest == 0, 1, largest)[..., 0]
        return torch.where(largest[..., 0] == 0, 1, ratio).log()  # NaN stays NaN
