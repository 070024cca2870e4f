"""The control that looks at nothing: an even spatial grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune.methods.base import ImageTokens, Method, Needs, Selection


@dataclass(frozen=True)
class Uniform(Method):
    """Keeps k tokens spread evenly over the image.

    Evenly spaced rows of the grid, as many as make the vertical and horizontal steps about equal, share the k
    tokens as equally as k allows; each row's share is spaced evenly over the width. Frames count as rows. At a
    second cut: evenly spaced among what remains, in raster order.
    """

    name: ClassVar[str] = "uniform"

    def needs(self) -> Needs:
        return Needs()

    def select(self, image: ImageTokens, k: int) -> Selection:
        if image.n != image.grid.tokens:
            return Selection(_spread(k, image.n).to(image.raster.device, non_blocking=True))
        rows, width = image.grid.frames * image.grid.height, image.grid.width
        # As many rows as make the step about equal in both directions, and enough of them to hold k tokens.
        used = min(rows, k, max(-(-k // width), round((k * rows / width) ** 0.5)))
        chosen = _spread(used, rows)
        bounds = [round(i * k / used) for i in range(used + 1)]
        keep = [
            row * width + column
            for i, row in enumerate(chosen.tolist())
            for column in _spread(bounds[i + 1] - bounds[i], width).tolist()
        ]
        return Selection(torch.tensor(keep).to(image.raster.device, non_blocking=True))


def _spread(k: int, n: int) -> torch.Tensor:
    """k of n indices, ascending, at the middles of k equal intervals."""
    return (torch.arange(k) * 2 + 1) * n // (2 * k)
