"""DivPrune: tokens that differ most from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import ImageTokens, Method, Needs
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min diversity of the projected features before the LLM; looks neither at attention nor at the text.

    With d(i, j) = 1 - cos(f_i, f_j): the first token is the one whose nearest other is farthest, max_i min_{j != i}
    d(i, j); then, k - 1 times, the one whose nearest chosen token is farthest, max_i min_{j in S} d(i, j). Equal
    distances: the lower index.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175, equation 3
    and algorithm 1. At a later cut the same, of the features of what is left. It is n^2 similarities and k steps that
    wait for each other: on a GPU launches decide.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "arXiv 2503.02175"
    before_llm: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(features=True)

    def select(self, image: ImageTokens, k: int) -> Selection:
        assert image.features is not None
        unit = torch.nn.functional.normalize(image.features.float(), dim=1)
        return Selection(max_min(1 - unit @ unit.T, k).sort().values.to(image.raster.device))


def max_min(distance: Tensor, k: int) -> Tensor:
    """(k,) indices, in the order in which they are chosen, of items with these distances (n, n)."""
    apart = distance.clone().fill_diagonal_(torch.inf)
    first = apart.amin(1).argmax()
    chosen = [first]
    nearest = distance.index_select(0, first[None])[0].index_fill(0, first[None], -torch.inf)
    for _ in range(k - 1):
        best = nearest.argmax()[None]
        chosen.append(best[0])
        nearest = torch.minimum(nearest, distance.index_select(0, best)[0]).index_fill_(0, best, -torch.inf)
    return torch.stack(chosen)
