"""The control that looks at nothing: an even spatial grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch

from tokenprune.methods.base import Method, cut_layers
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.space import Dimension, Setting
from tokenprune.tokens import Grid, Selection


@dataclass(frozen=True)
class Uniform(Method):
    """Keeps k tokens spread evenly over the image.

    Evenly spaced rows of the grid, as many as make the vertical and horizontal steps about equal, share the k
    tokens as equally as k allows; each row's share is spaced evenly over the width. Frames count as rows; views
    share k by their size. At a second cut: evenly spaced among what remains, in raster order.
    """

    name: ClassVar[str] = "uniform"

    def needs(self) -> Needs:
        return Needs()

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension]:
        return {"layer": cut_layers(setting, lowest=0)}

    def select(self, image: ImageTokens, k: int) -> Selection:
        if image.n != sum(grid.tokens for grid in image.grids):
            return Selection(_spread(k, image.n).to(image.raster.device, non_blocking=True))
        return Selection(torch.tensor(even_tokens(image.grids, k)).to(image.raster.device, non_blocking=True))


def even_tokens(grids: Sequence[Grid], k: int) -> list[int]:
    """k raster indices of an image, spread evenly over its views by their size."""
    ends = list(accumulate(grid.tokens for grid in grids))
    keep, before, start = [], 0, 0
    for grid, end in zip(grids, ends, strict=True):
        share = round(k * end / ends[-1])
        keep += [start + index for index in _even(grid, share - before)]
        before, start = share, end
    return keep


def _even(grid: Grid, k: int) -> list[int]:
    """k raster indices of a grid, evenly spread."""
    if k == 0:
        return []
    rows, width = grid.frames * grid.height, grid.width
    # As many rows as make the step about equal in both directions, and enough of them to hold k tokens.
    used = min(rows, k, max(-(-k // width), round((k * rows / width) ** 0.5)))
    bounds = [round(i * k / used) for i in range(used + 1)]
    return [
        row * width + column
        for i, row in enumerate(_spread(used, rows).tolist())
        for column in _spread(bounds[i + 1] - bounds[i], width).tolist()
    ]


def _spread(k: int, n: int) -> torch.Tensor:
    """k of n indices, ascending, at the middles of k equal intervals."""
    return (torch.arange(k) * 2 + 1) * n // (2 * k)
