"""PruMerge+: what CLS attends to far more than to the rest, an even grid beside it, and neighbours merged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import Method, check_count, check_flag
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.methods.spread import on_grid_first
from tokenprune.methods.visionzip import attended_and_keys
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class PruMerge(Method):
    """Outliers of CLS attention and an even grid before the LLM; each takes up what is like it. Blind to the text.

    With a the attention from CLS in the vision layer that yields the features (in towers without CLS: the attention
    received), mean over heads: outliers are the tokens with a > Q3 + 1.5 (Q3 - Q1) over the image. They come first;
    the rest of the k are the best of an even grid of k. Then each kept token p becomes y_p + sum_j a_j y_j over its
    `neighbours` nearest of the dropped, by the cosine of keys (mean over heads).

    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv 2403.15388, section
    3 and algorithm 1; "+" is the grid. The paper's count follows from the outliers alone: `adaptive=True` keeps as many
    as there are, no grid, whatever the budget says. The release samples its grid at a step of the outliers' share; here
    it fills the budget. At a later cut nothing is merged.

    Args:
        neighbours: how many dropped tokens each kept one takes up, 0 or more.
        adaptive: whether an image keeps as many tokens as are outliers; costs one copy from the device.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "arXiv 2403.15388"
    before_llm: ClassVar[bool] = True

    neighbours: int = 32
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_flag("adaptive", self.adaptive)
        check_count("neighbours", self.neighbours)

    def needs(self) -> Needs:
        return Needs(vision=attended_and_keys, merges=True, counts=self.adaptive)

    def count(self, image: ImageTokens, planned: tuple[int, ...]) -> Tensor:
        assert image.vision is not None
        return outliers(image.vision[:, 0]).sum().clamp(min=1).expand(len(planned))

    def select(self, image: ImageTokens, k: int) -> Selection:
        assert image.vision is not None
        score, key = image.vision[:, 0], image.vision[:, 1:]
        # Outliers, then the grid, then the rest, each by attention, which lies in [0, 1].
        gridded = on_grid_first(image, torch.zeros_like(score), k).isinf()
        rank = score + torch.where(outliers(score), 4.0, torch.where(gridded, 2.0, 0.0))
        order = (-rank.double()).sort(stable=True).indices
        keep, gone = order[:k].sort().values, order[k:]
        near = min(self.neighbours, len(gone))
        if image.cut or not near:
            return Selection(keep)
        unit = torch.nn.functional.normalize(key, dim=1)
        taken = gone[(unit[keep] @ unit[gone].T).topk(near, dim=1).indices]  # (k, near)
        own = torch.stack([keep, keep], dim=1)
        pairs = torch.stack([taken.flatten(), keep.repeat_interleave(near)], dim=1)
        weights = torch.cat([torch.ones_like(score[keep]), score[taken].flatten()])
        return Selection(keep, torch.cat([own, pairs]), weights)


def outliers(attention: Tensor) -> Tensor:
    """(n,) bool: above the third quartile by more than 1.5 interquartile ranges."""
    low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    return attention > high + 1.5 * (high - low)
