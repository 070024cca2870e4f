"""How diverse a set of tokens is: estimators of one signature, one file each.

`estimate(tokens)` prepares one set (centred, rows of length 1) and measures it; `make_estimator(name)` gives the
estimator itself, which takes batches as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.estimators.base import Estimator, SpectralEstimator, prepare, spectrum
from tokenprune.estimators.condition_number import ConditionNumber
from tokenprune.estimators.diffusion import DiffusionSpectralEntropy
from tokenprune.estimators.effective_rank import EffectiveRank
from tokenprune.estimators.nuclear_norm import NuclearNorm
from tokenprune.estimators.renyi import Renyi
from tokenprune.estimators.von_neumann import VonNeumann
from tokenprune.named import build

ESTIMATORS: dict[str, type[Estimator]] = {
    e.name: e
    for e in (VonNeumann, Renyi, DiffusionSpectralEntropy, EffectiveRank, NuclearNorm, ConditionNumber)
}


def make_estimator(estimator: str | Estimator, **parameters: Any) -> Estimator:
    """An estimator by name and parameters; an instance comes back as it is.

    Raises:
        ConfigError: an unknown name or parameter, or a value it refuses.
    """
    if isinstance(estimator, Estimator):
        if parameters:
            raise ConfigError(f"{', '.join(parameters)}: set on the estimator you pass, not beside it")
        return estimator
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        raise ConfigError(f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    return build("estimator", estimator, ESTIMATORS[estimator], parameters)


def estimate(tokens: Tensor, estimator: str | Estimator = "von_neumann", **parameters: Any) -> Tensor:
    """Diversity of one set of tokens (n, D), centred and scaled to unit rows first: a scalar.

    NaN when fewer than two tokens differ from the mean.

    Raises:
        ConfigError: not an (n, D) tensor, or an unknown estimator.
    """
    made = make_estimator(estimator, **parameters)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not tokens.is_floating_point():
        raise ConfigError("estimate takes one set of tokens, a floating tensor (tokens, width)")
    z = prepare(tokens)
    if len(z) < 2:
        return torch.full((), torch.nan, dtype=z.dtype, device=z.device)
    return made(z)


__all__ = [
    "ESTIMATORS",
    "ConditionNumber",
    "DiffusionSpectralEntropy",
    "EffectiveRank",
    "Estimator",
    "NuclearNorm",
    "Renyi",
    "SpectralEstimator",
    "VonNeumann",
    "estimate",
    "make_estimator",
    "prepare",
    "spectrum",
]
