"""EVS: of a video, what changes from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import ScoreMethod
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.methods.uniform import even_tokens
from tokenprune.tokens import Grid

#: Of the first frame's tokens: above 2, the most that 1 - cos can be.
_FIRST = 3.0


@dataclass(frozen=True)
class EVS(ScoreMethod):
    """Keeps the first frame, and of the others the tokens least like those at their place one frame before.

    Score: 1 - cos(f[t, y, x], f[t - 1, y, x]) of the projected features; the first frame comes before all others. Where
    less than the first frame is asked for, its tokens on an even grid come first: of a picture, which is one frame,
    that is `uniform`. Blind to the text.

    Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624.
    At a later cut a token whose place was empty one frame before counts as new.
    """

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "arXiv 2510.14624"
    before_llm: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(features=True)

    def score(self, image: ImageTokens) -> Tensor:
        assert image.features is not None
        features = image.features.float()
        total = sum(grid.tokens for grid in image.grids)
        raster = image.raster.to(features.device)
        unit = features.new_zeros(total, features.shape[1])
        unit[raster] = torch.nn.functional.normalize(features, dim=1)  # nothing is like a place that is empty
        score, start = features.new_zeros(total), 0
        for grid in image.grids:
            own = unit[start : start + grid.tokens].view(grid.frames, grid.height * grid.width, -1)
            change = 1 - (own[1:] * own[:-1]).sum(-1)
            first = change.new_full((1, change.shape[1]), _FIRST)
            score[start : start + grid.tokens] = torch.cat([first, change]).flatten()
            start += grid.tokens
        return score[raster]

    def ranked(self, image: ImageTokens, score: Tensor, k: int) -> Tensor:
        firsts = [Grid(1, grid.height, grid.width) for grid in image.grids]
        index, start, before = [], 0, 0
        shown = even_tokens(firsts, min(k, sum(grid.tokens for grid in firsts)))
        for first, grid in zip(firsts, image.grids, strict=True):
            index += [start + token - before for token in shown if before <= token < before + first.tokens]
            start, before = start + grid.tokens, before + first.tokens
        even = torch.zeros(start, dtype=torch.bool)
        even[index] = True
        return score.masked_fill(even.to(score.device, non_blocking=True)[image.raster], torch.inf)
