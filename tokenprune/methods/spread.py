"""Keeping some tokens for where they are, around any method that scores: an even grid beside the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.methods.base import ScoreMethod
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.methods.uniform import even_tokens
from tokenprune.tokens import DecoderShape, Grid


@dataclass(frozen=True)
class Spread(ScoreMethod):
    """Of k tokens, round(share k) on `Uniform`'s even grid, and the best of the others by another method's score.

    At a later cut the tokens of the smaller grid that are still there come first. Source: ours; a score alone keeps
    objects and loses what lies around them, an even grid the other way round (eval/results/ablations_small.csv).

    Args:
        method: a method that scores tokens.
        share: of the tokens kept, in [0, 1].
    """

    name: ClassVar[str] = "spread"

    method: ScoreMethod
    share: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.method, ScoreMethod):
            raise ConfigError(f"Spread goes around a method that scores tokens, not {self.method!r}")
        check_share(self.share)

    def needs(self) -> Needs:
        return self.method.needs()

    def check(self, shape: DecoderShape) -> None:
        self.method.check(shape)

    def score(self, image: ImageTokens) -> Tensor:
        return self.method.score(image)

    def notes(self, image: ImageTokens) -> Mapping[str, int | Tensor]:
        return self.method.notes(image)

    def ranked(self, image: ImageTokens, score: Tensor, k: int) -> Tensor:
        return on_grid_first(image, self.method.ranked(image, score, k), round(self.share * k))


def check_share(share: object) -> None:
    """Raises ConfigError for what is no share."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ConfigError(f"the share of an even grid must be a number from 0 to 1, not {share!r}")


def on_grid_first(image: ImageTokens, score: Tensor, k: int) -> Tensor:
    """The score, but k tokens of an even grid, as far as they are there, before all others."""
    even = _on_grid(image.grids, k).to(score.device, non_blocking=True)
    return torch.where(even[image.raster], torch.inf, score.double())


@lru_cache(maxsize=64)
def _on_grid(grids: tuple[Grid, ...], k: int) -> Tensor:
    """(n,) bool of an image's original tokens."""
    marks = torch.zeros(sum(grid.tokens for grid in grids), dtype=torch.bool)
    marks[even_tokens(grids, k)] = True
    return marks
