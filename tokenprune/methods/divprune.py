"""DivPrune: tokens that differ most from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import Method, select_alike, stacked
from tokenprune.methods.seen import ImageTokens, Needs
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
        return self.select_all([image], [k])[0]

    def select_all(self, images: Sequence[ImageTokens], counts: Sequence[int]) -> list[Selection]:
        def choose(group: Sequence[ImageTokens], k: int) -> Tensor:
            unit = torch.nn.functional.normalize(stacked(group, "features").float(), dim=2)
            return max_min(1 - unit @ unit.transpose(1, 2), k)

        return select_alike(images, counts, choose)


def max_min(distance: Tensor, k: int) -> Tensor:
    """(b, k) indices, in the order in which they are chosen, of items with these distances (b, n, n)."""
    batch = torch.arange(len(distance), device=distance.device)
    diagonal = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    best = distance.masked_fill(diagonal, torch.inf).amin(2).argmax(1)
    distance = distance.masked_fill(diagonal, -torch.inf)  # what is chosen is as near as can be
    chosen, nearest = [best], distance[batch, best]
    for _ in range(k - 1):
        best = nearest.argmax(1)
        chosen.append(best)
        nearest = torch.minimum(nearest, distance[batch, best])
    return torch.stack(chosen, dim=1)
