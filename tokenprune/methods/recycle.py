"""Merging what is dropped, around any method that scores: recycling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.methods.base import DecoderShape, ImageTokens, Method, Needs, ScoreMethod
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class Recycle(Method):
    """Keeps the best tokens of another method, and at its first cut one merged token for each cell of dropped ones.

    Of the k tokens asked for, `share` are merged ones: the dropped tokens are shared out among so many cells, those
    next to each other in raster order together; each cell becomes the mean of its tokens weighted by max(score, 0)
    (equal weights where a cell sums to 0), and stands in the place of its best token. The number kept is exactly k. At
    later cuts the other method chooses alone; it can tell merged tokens by `ImageTokens.sizes`.

    Source: VFlowOpt, arXiv 2508.05211, merges by cells of a grid with the same weights; exact budgets are ours.

    Args:
        method: a method that scores tokens.
        share: of the tokens kept that are merged ones, above 0 and below 1.
    """

    name: ClassVar[str] = "recycle"

    method: ScoreMethod
    share: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.method, ScoreMethod):
            raise ConfigError(f"Recycle goes around a method that scores tokens, not {self.method!r}")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < 1:
            raise ConfigError(f"share must be above 0 and below 1, not {self.share!r}")

    def needs(self) -> Needs:
        return self.method.needs()

    def check(self, shape: DecoderShape) -> None:
        self.method.check(shape)

    def select(self, image: ImageTokens, k: int) -> Selection:
        score = self.method.checked_score(image)
        cells = 0 if image.cut else min(round(self.share * k), image.n - k)
        if not cells:
            return self.method.best(image, score, k)
        best = self.method.best(image, score, k - cells)
        dropped = _others(best.keep, image.n)  # (n - k + cells,)
        cell = torch.arange(len(dropped), device=dropped.device) * cells // len(dropped)
        weights = score[dropped].double().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        total = weights.new_zeros(cells).index_add_(0, cell, weights)[cell]
        count = weights.new_zeros(cells).index_add_(0, cell, torch.ones_like(weights))[cell]
        weights = torch.where(
            total > 0, weights / total.clamp(min=torch.finfo(torch.float64).tiny), 1 / count
        )
        slots = dropped[_best_of_each(score[dropped], cell, cells)]
        keep = torch.cat([best.keep, slots]).sort().values
        merges = torch.stack([dropped, slots[cell]], dim=1)
        return Selection(
            keep, merges, weights.float(), notes={**best.notes, "tokens made of dropped ones": cells}
        )


def _others(keep: Tensor, n: int) -> Tensor:
    """The indices below n that are not among `keep`, ascending; their number is known on the host."""
    gone = torch.ones(n, dtype=torch.long, device=keep.device).index_fill_(0, keep, 0)
    return gone.sort(descending=True, stable=True).indices[: n - len(keep)]


def _best_of_each(score: Tensor, cell: Tensor, cells: int) -> Tensor:
    """(cells,) index of the best scored token of each cell; equal scores: the lower index."""
    order = (-score.double()).sort(stable=True).indices  # NaN last
    by_cell = order[cell[order].sort(stable=True).indices]
    starts = torch.searchsorted(cell, torch.arange(cells, device=cell.device))
    return by_cell[starts]
