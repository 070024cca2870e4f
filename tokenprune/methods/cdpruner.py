"""CDPruner: tokens that differ from each other and are like the question's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import Method, select_alike, stacked
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import Selection

#: What is left of a token below this is rounding.
_NOTHING = 1e-5


@dataclass(frozen=True)
class CDPruner(Method):
    """The greedy MAP of a determinantal point process over the projected features, conditioned on the question.

    With f the features and t the word embeddings of the text behind the row's last image: r_i = mean_j cos(f_i, t_j),
    scaled to [0, 1] over the image; the kernel is r_i cos(f_i, f_j) r_j; k times, the token that raises log det of the
    chosen ones' kernel most. Equal ones: the lower index.

    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", arXiv
    2506.10967, section 3; greedy MAP by incremental Cholesky is Chen et al., arXiv 1709.05135, algorithm 1. For LLaVA
    the release rates by CLIP's text encoder, which a stock model does not carry (and by minus that cosine); here words
    are the decoder's own, as the paper does where there is no text encoder. It is n^2 similarities and k steps that
    wait for each other.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "arXiv 2506.10967"
    before_llm: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(features=True, words=True)

    def select(self, image: ImageTokens, k: int) -> Selection:
        return self.select_all([image], [k])[0]

    def select_all(self, images: Sequence[ImageTokens], counts: Sequence[int]) -> list[Selection]:
        return select_alike(images, counts, _choose)


def _choose(group: Sequence[ImageTokens], k: int) -> Tensor:
    unit = torch.nn.functional.normalize(stacked(group, "features").float(), dim=2)
    relevance = torch.stack(
        [features @ _asked(image).to(unit.device) for features, image in zip(unit, group, strict=True)]
    )
    least, most = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    relevance = (relevance - least + 1e-6) / (most - least + 1e-6)
    return greedy_map(unit * relevance[:, :, None], k)


def _asked(image: ImageTokens) -> Tensor:
    """(d,) mean of the unit word embeddings behind the row's last image: a cosine with it is the mean of cosines."""
    assert image.prompt is not None
    return torch.nn.functional.normalize(image.prompt.asking.float(), dim=1).mean(0)


def greedy_map(rows: Tensor, k: int) -> Tensor:
    """(b, k) indices, in the order in which they are chosen, of rows (b, n, d) whose Gram determinant grows most."""
    kernel = rows @ rows.transpose(1, 2)
    left = kernel.diagonal(dim1=1, dim2=2).clone()  # squared length of what the chosen rows do not span
    batch = torch.arange(len(rows), device=rows.device)
    factor = kernel.new_zeros(len(rows), k, rows.shape[1])
    chosen: list[Tensor] = []
    for step in range(k):
        best = left.where((left > _NOTHING) | left.isneginf(), 0).argmax(1)
        chosen.append(best)
        made = factor[:, :step]
        along = kernel[batch, best] - (made[batch, :, best][:, None] @ made)[:, 0]
        length = left[batch, best][:, None]
        factor[:, step] = (along * length.clamp_min(_NOTHING).rsqrt()).where(length > _NOTHING, 0)
        left = (left - factor[:, step].square()).scatter_(1, best[:, None], -torch.inf)
    return torch.stack(chosen, dim=1)
