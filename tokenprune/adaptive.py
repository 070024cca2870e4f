"""Budgets that follow the picture: how much of it is kept is read off its features or pixels, before layer 0.

The idea's root is KARL, "Single-pass Adaptive Image Tokenization for Minimum Program Search": as many tokens as the
picture needs, in one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.estimators.base import density, entropy

Rule = Literal["energy", "rank", "grey"]
RULES: tuple[str, ...] = get_args(Rule)
_MOST = 1024  # tokens whose spectrum is taken: of more, as many at even distances


@dataclass(frozen=True)
class Adaptive:
    """A budget for `keep` that is settled for each picture: `wrap(model, keep=Adaptive(0.25, tau=...))`.

    Args:
        mean: share of the visual tokens kept on average over pictures, and over layers as every `keep`.
        rule: what is read off a picture of n tokens:
            "energy": k / n, k the least number of singular values of its projected features (n, D) that hold a share
            `tau` of their squared sum (arXiv 2603.05950);
            "rank": tau times its effective rank over n (the exponential of the entropy of the squared singular values,
            arXiv 2603.01236);
            "grey": tau times the mean grey-level entropy of its patches, in bytes (arXiv 2605.09982).
        tau: makes the rule meet `mean` on pictures like yours: `tokenprune.calibrate` finds it, without labels. None
            until then; a model is wrapped with it only once it is known.
        low, high: bounds of a picture's share.

    Raises:
        ConfigError: says which number may be what.
    """

    mean: float
    rule: Rule = "energy"
    tau: float | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mean", "low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a share between 0 and 1, not {value!r}")
        if not (self.low <= self.mean <= self.high and self.mean > 0):
            raise ConfigError(
                f"low={self.low}, mean={self.mean} and high={self.high} have to be in this order"
            )
        if self.rule not in RULES:
            raise ConfigError(f"rule must be one of {', '.join(RULES)}, not {self.rule!r}")
        tau = self.tau
        if tau is not None and (
            isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau < math.inf
        ):
            raise ConfigError(f"tau must be a number above 0, not {tau!r}")
        if tau is not None and self.rule == "energy" and tau > 1:
            raise ConfigError(f"tau of rule 'energy' is a share of the squared sum, at most 1, not {tau!r}")

    @property
    def reads_pixels(self) -> bool:
        return self.rule == "grey"

    def share(self, shown: Tensor) -> Tensor:
        """What the rule says of a picture, not yet bounded: (), on its device.

        Args:
            shown: (n, D) projected features; for "grey" (n,) the grey-level entropy of each token's patches in bits.
        """
        assert self.tau is not None
        return self.told(statistic(self.rule, shown), self.tau)

    def told(self, read: Tensor, tau: float) -> Tensor:
        """The share that a `statistic` comes to with a tau."""
        if self.rule == "energy":
            return ((read < tau).sum() + 1).clamp(max=len(read)) / len(read)
        return tau * read

    def bounded(self, share: float) -> float:
        """Within the bounds; a picture whose numbers are none keeps the mean."""
        return self.mean if share != share else min(self.high, max(self.low, share, 1e-9))


def statistic(rule: Rule, shown: Tensor) -> Tensor:
    """What a rule reads of a picture, whatever tau is.

    Args:
        rule: its name.
        shown: see `Adaptive.share`.

    Returns:
        "energy": (m,) the share of the squared sum that the first 1, 2, ... singular values hold; else ().
    """
    if rule == "grey":
        return shown.float().mean() / 8
    squares = _squares(shown)
    if rule == "energy":
        return squares.cumsum(0) / squares.sum()
    return entropy(density(squares)).exp() / len(squares)


def _squares(features: Tensor) -> Tensor:
    """The squared singular values of (n, D), the largest first, min(n, 1024) of them."""
    n = len(features)
    if n > _MOST:
        features = features[torch.arange(_MOST, device=features.device) * n // _MOST]
    x = features.float()
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    found = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)
    return torch.nn.functional.pad(found, (0, max(0, len(x) - len(found))))
