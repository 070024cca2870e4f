"""Merging what is dropped, around another method: recycling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.methods.base import Choice, Method, ScoreMethod, check_flag
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import DecoderShape, Grid, Selection

ENLARGED = "recycling cells were enlarged to fit the budget"
HOW = Choice(("hopfield", "cells"))
_MOST = 1e6  # of cells' sides and inverse temperatures: float32 has room for its products
_PATTERNS = (
    2  # kept tokens that take one up in "hopfield"; at its temperatures the third gets next to nothing
)


@dataclass(frozen=True)
class Recycle(Method):
    """Keeps the best tokens of another method, and merges those that its first cut drops.

    "cells": each grid is divided into cells of `side` x `side` tokens, (floor(row / side), floor(column / side)). The
    least important tokens are dropped; those of one cell are merged into the weighted mean of their states, weights
    proportional to max(score, 0) (equal where a cell sums to 0), in the place of the best of them. As few are dropped
    as make what is kept and what is merged exactly k together; where there are more cells than k, cells are enlarged,
    and the report says so. Source: VFlowOpt, arXiv 2508.05211, section 3, whose release overshoots its budget; exact
    counts are ours.

    "hopfield": one step of Hopfield retrieval (arXiv 2008.02217): each dropped token is a query, the k kept ones are
    the stored patterns, and p = softmax(beta cos) over the most similar two says how much of it each takes up; a kept
    token becomes the mean of itself and what it took up. Similarity is that of the projector's features.

    At later cuts the other method chooses alone, or, with `every`, "hopfield" merges there, too: tokens then count by
    how many they stand for.

    Args:
        method: what chooses; for "cells" one that scores tokens.
        side: of a cell, in tokens, at least 1; it need not be whole.
        protect: whether merged tokens stay at later cuts.
        size_term: whether log(number of tokens merged) is added to the attention logits of merged ones, as in ToMe.
        how: "cells" or "hopfield".
        beta: inverse temperature of "hopfield".
        every: whether later cuts merge, too; "hopfield" only.
    """

    name: ClassVar[str] = "recycle"

    method: Method
    side: float = 4.0
    protect: bool = False
    size_term: bool = False
    how: str = "cells"
    beta: float = 100.0
    every: bool = False

    def __post_init__(self) -> None:
        HOW.check("how", self.how)
        scores = isinstance(self.method, ScoreMethod)
        if not isinstance(self.method, Method) or not (
            scores or (self.how == "hopfield" and not self.protect)
        ):
            raise ConfigError(
                f"Recycle goes around a method that scores tokens, not {self.method!r}; with how='hopfield' and "
                f"protect=False around any"
            )
        for what, least in (("side", 1.0), ("beta", 0.0)):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _MOST:
                of = "the side of recycling cells" if what == "side" else what
                raise ConfigError(f"{of} must be a number from {least:g} to {_MOST:g}, not {value!r}")
        for what in ("protect", "size_term", "every"):
            check_flag(what, getattr(self, what))
        if self.every and self.how != "hopfield":
            raise ConfigError(
                f"recycling at every cut needs how='hopfield', not {self.how!r}: cells are the first cut's"
            )

    def needs(self) -> Needs:
        needs = self.method.needs()
        features = needs.features or self.how == "hopfield"
        return replace(needs, bias=self.size_term, merges=True, features=features)

    def check(self, shape: DecoderShape) -> None:
        self.method.check(shape)

    def select(self, image: ImageTokens, k: int) -> Selection:
        return self.select_all([image], [k])[0]

    def select_all(self, images: Sequence[ImageTokens], counts: Sequence[int]) -> list[Selection]:
        merges = self.every or not images[0].cut
        if merges and self.how == "cells":
            return [self._cells(image, k) for image, k in zip(images, counts, strict=True)]
        if self.protect:
            best = [self._best(image, k) for image, k in zip(images, counts, strict=True)]
        else:
            best = self.method.select_all(images, counts)
        if not merges:
            return best
        return [
            retrieve(image, own, self.beta, self.size_term) for image, own in zip(images, best, strict=True)
        ]

    def _cells(self, image: ImageTokens, k: int) -> Selection:
        assert isinstance(self.method, ScoreMethod)
        score = self.method.checked_score(image)
        kept = recycle(image, score, k, self.side, self.size_term, self.method.ranked(image, score, k))
        return replace(kept, notes={**kept.notes, **self.method.notes(image)})

    def _best(self, image: ImageTokens, k: int) -> Selection:
        """The other method's choice, at later cuts merged tokens first."""
        if image.merged_sizes is None or not image.cut:
            return self.method.select(image, k)
        assert isinstance(self.method, ScoreMethod)
        score = self.method.checked_score(image).float()
        return self.method.best(image, torch.where(image.merged_sizes > 1, torch.inf, score), k)


def retrieve(image: ImageTokens, best: Selection, beta: float, size_term: bool = False) -> Selection:
    """What is kept, with what is dropped taken up into it; see `Recycle`, "hopfield"."""
    assert image.features is not None
    keep, n, k = best.keep, image.n, len(best.keep)
    gone = torch.ones(n, dtype=torch.long, device=keep.device).index_fill_(0, keep, 0)
    drop = gone.sort(descending=True, stable=True).indices[: n - k]
    unit = torch.nn.functional.normalize(image.features.float().to(keep.device), dim=1)
    near, pattern = (unit[drop] @ unit[keep].T).topk(min(_PATTERNS, k), dim=1)
    sizes = image.sizes.to(keep.device)
    taken = (beta * near).softmax(1) * sizes[drop, None]  # (n - k, patterns)
    mass = sizes[keep].index_add(0, pattern.flatten(), taken.flatten())
    source = torch.cat([keep, drop[:, None].expand_as(pattern).flatten()])
    slot = torch.cat([torch.arange(k, device=keep.device), pattern.flatten()])
    weights = torch.cat([sizes[keep], taken.flatten()]) / mass[slot]
    merges = torch.stack([source, keep[slot]], dim=1)
    return Selection(keep, merges, weights, mass.log() if size_term else None, best.notes)


def recycle(
    image: ImageTokens,
    score: Tensor,
    k: int,
    side: float,
    size_term: bool = False,
    ranked: Tensor | None = None,
) -> Selection:
    """k tokens: the best ones, and one for each cell of the others; see `Recycle`.

    Args:
        image: at its first cut, where nothing is gone yet (but perhaps its last token).
        score: (n,) importance.
        k: tokens in all, 1 <= k < n.
        side: of a cell.
        size_term: whether the selection biases attention by the log of the sizes.
        ranked: (n,) by what tokens are dropped, where that is not the score.
    """
    n, device = image.n, score.device
    layout, number, enlarged = _layout(image.grids, n, k, side)
    cell = layout.to(device, non_blocking=True)
    # Ranks from the least important on; equal scores: the higher index goes first. NaN counts as least.
    value, by = (
        x.double().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        for x in (score, score if ranked is None else ranked)
    )
    order = n - 1 - by.flip(0).sort(stable=True).indices
    place = torch.arange(n, device=device)
    rank = torch.empty_like(place).index_copy_(0, order, place)
    first = torch.full((number,), n, device=device).scatter_reduce_(0, cell, rank, "amin")
    opens = rank == first[cell]  # the first of its cell to go
    # After dropping j tokens, n - j + (cells opened so far) are left, which falls in steps of 0 or 1.
    left = n - (place + 1) + opens[order].cumsum(0)
    drop = torch.searchsorted(-left, torch.tensor(-k, device=device)) + 1  # the least j that leaves k
    dropped = rank < drop
    best = torch.full((number,), -1, device=device).scatter_reduce_(
        0, cell, torch.where(dropped, rank, -1), "amax"
    )
    slot = torch.where(dropped, order[best[cell].clamp(min=0)], place)
    stays = ~dropped | (slot == place)
    keep = (~stays).long().sort(stable=True).indices[:k].sort().values
    # Sums over each cell, handed back to its tokens.
    mass = torch.stack([torch.where(dropped, value.clamp(min=0), 0.0), dropped.double()], dim=1)
    total, count = mass.new_zeros(number, 2).index_add_(0, cell, mass)[cell].unbind(1)
    share = torch.where(total > 0, mass[:, 0] / torch.where(total > 0, total, 1), 1 / count.clamp(min=1))
    weights = torch.where(dropped, share, 1.0).float()
    size = torch.zeros(n, device=device).index_add_(0, slot, torch.ones(n, device=device))
    return Selection(
        keep,
        torch.stack([place, slot], dim=1),
        weights,
        size[keep].log() if size_term else None,
        {ENLARGED: int(enlarged)},
    )


@lru_cache(maxsize=64)
def _layout(grids: tuple[Grid, ...], n: int, k: int, side: float) -> tuple[Tensor, int, bool]:
    """`cells` as a tensor, their number, and whether they were enlarged: the same for every image of a size."""
    numbers, enlarged = cells(grids, n, k, side)
    return torch.tensor(numbers), max(numbers) + 1, enlarged


def cells(grids: tuple[Grid, ...], n: int, k: int, side: float) -> tuple[tuple[int, ...], bool]:
    """The cell of each of the first n tokens, numbered from 0 over all grids and frames: at most k of them.

    Returns:
        The numbers, and whether cells had to be larger than `side`: the next whole number that fits is taken, and one
        cell for everything where none does (more frames than tokens to keep).
    """
    wide, most = side, max(max(grid.height, grid.width) for grid in grids)
    while True:
        parts, start = [], 0
        for grid in grids:
            frame, row, column = np.indices((grid.frames, grid.height, grid.width)).reshape(3, -1)
            across = math.ceil(grid.width / wide) + 1
            down = math.ceil(grid.height / wide) + 1
            own = (frame * down + (row // wide).astype(np.int64)) * across + (column // wide).astype(np.int64)
            parts.append(start + own)
            start += grid.frames * down * across
        numbers = np.unique(np.concatenate(parts)[:n], return_inverse=True)[1]
        if numbers.max() < k:
            return tuple(numbers.tolist()), wide > side
        if wide >= most:
            return (0,) * n, True
        wide = math.floor(wide) + 1
