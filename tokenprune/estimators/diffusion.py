"""Diffusion spectral entropy: diversity of a random walk between tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.estimators.base import Estimator, entropy, is_positive


@dataclass(frozen=True)
class DiffusionSpectralEntropy(Estimator):
    """S_D = - sum a_i log a_i / log n,  a_i = |mu_i|^t / sum_j |mu_j|^t, mu the eigenvalues of the diffusion matrix P.

    G_ij = exp(-||z_i - z_j||^2 / (2 sigma^2)), K = G / (q_i q_j)^(1/2) with q = G 1 (anisotropic density
    normalisation), P = D^-1 K with D = diag(K 1). P's eigenvalues are those of the symmetric D^-1/2 K D^-1/2.

    Paper: Liao et al., "Assessing Neural Network Representations During Training Using Noise-Resilient Diffusion
    Spectral Entropy", arXiv 2312.04823.
    Range: [0, 1]: 0 when every token reaches every other alike, 1 when none reaches another.
    Cost: n^2 D for the distances and n^3 for the eigenvalues, n tokens: there is no smaller Gram matrix for it.
    Blind to: rotations, shifts and order. Not scale-invariant: sigma is in the tokens' own unit.

    Args:
        t: diffusion time, > 0. Powers drop small eigenvalues, and with them noise and, when t is large, the finer
            clusters. At t = 1 noise moves it as much as the others (`python -m tokenprune_eval.studies.noise`).
        sigma: bandwidth of the kernel, > 0; prepared tokens are on the unit sphere, unrelated ones sqrt(2) apart.
    """

    name: ClassVar[str] = "diffusion"
    paper: ClassVar[str] = "arXiv 2312.04823"

    t: float = 4.0
    sigma: float = 0.5

    def __post_init__(self) -> None:
        for name in ("t", "sigma"):
            value = getattr(self, name)
            if not is_positive(value):
                raise ConfigError(f"{name} must be a number above 0, not {value!r}")

    def _estimate(self, tokens: Tensor) -> Tensor:
        z = tokens if tokens.dtype == torch.float64 else tokens.float()
        z = z - z.mean(-2, keepdim=True)  # distances do not change, their rounding does
        square = z.square().sum(-1)
        distance = torch.baddbmm(square[:, :, None] + square[:, None, :], z, z.mT, alpha=-2)
        kernel = distance.clamp_(min=0).mul_(-0.5 / self.sigma**2).exp_()
        kernel.diagonal(dim1=-2, dim2=-1).fill_(1)
        density = kernel.sum(-1).rsqrt()
        kernel.mul_(density[:, :, None]).mul_(density[:, None, :])
        degree = kernel.sum(-1).rsqrt()
        kernel.mul_(degree[:, :, None]).mul_(degree[:, None, :])
        weights = torch.linalg.eigvalsh(kernel).abs().pow(self.t)
        return entropy(weights / weights.sum(-1, keepdim=True)) / math.log(kernel.shape[-1])
