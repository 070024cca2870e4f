"""The estimators in float64 once more, from singular values and differences written out: the truth of their tests."""

import math

import torch
from torch import Tensor


def eigenvalues(z: Tensor) -> Tensor:
    """The min(n, D) eigenvalues of Z Z^T / n, as squared singular values."""
    return torch.linalg.svdvals(z.double()).square() / z.shape[0]


def shares(z: Tensor) -> list[float]:
    """The eigenvalues over their sum."""
    values = [float(v) for v in eigenvalues(z)]
    return [v / sum(values) for v in values]


def von_neumann(z: Tensor) -> float:
    values = shares(z)
    return -sum(v * math.log(v) for v in values if v > 0) / math.log(max(2, len(values)))


def renyi(z: Tensor, alpha: float = 2.0) -> float:
    values = shares(z)
    return math.log(sum(v**alpha for v in values)) / ((1 - alpha) * math.log(max(2, len(values))))


def effective_rank(z: Tensor) -> float:
    return math.exp(von_neumann(z) * math.log(max(2, min(z.shape))))


def nuclear_norm(z: Tensor) -> float:
    return float(torch.linalg.matrix_norm(z.double(), ord="nuc")) / math.sqrt(z.shape[0])


def condition_number(z: Tensor) -> float:
    values = [float(v) for v in eigenvalues(z)]
    counted = [v for v in values if v > 1e-6 * max(values)]
    return -math.log(max(counted) / min(counted)) if counted else 0.0


def diffusion(z: Tensor, t: float = 4.0, sigma: float = 0.5) -> float:
    """|mu| as singular values of D^1/2 P D^-1/2, which has the eigenvalues of the row-stochastic P."""
    z = z.double()
    n = len(z)
    g = torch.exp(-torch.stack([(z - row).square().sum(1) for row in z]) / (2 * sigma**2))
    q = g.sum(1)
    k = g / (q[:, None] * q[None, :]).sqrt()
    p = k / k.sum(1, keepdim=True)
    root = k.sum(1).sqrt()
    weights = [float(v) ** t for v in torch.linalg.svdvals(root[:, None] * p / root[None, :])]
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w > 0) / math.log(n)
