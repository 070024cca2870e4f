"""CDPruner: tokens that differ from each other and are like the question's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import ImageTokens, Method, Needs
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
        assert image.features is not None and image.prompt is not None and image.prompt.words is not None
        unit = torch.nn.functional.normalize(image.features.float(), dim=1)
        words = image.prompt.words[-(image.prompt.behind or len(image.prompt.words)) :]
        relevance = (unit @ torch.nn.functional.normalize(words.float(), dim=1).T).mean(1)
        least, most = relevance.aminmax()
        relevance = (relevance - least + 1e-6) / (most - least + 1e-6)
        return Selection(greedy_map(unit * relevance[:, None], k).sort().values.to(image.raster.device))


def greedy_map(rows: Tensor, k: int) -> Tensor:
    """(k,) indices, in the order in which they are chosen, of rows (n, d) whose Gram determinant grows most."""
    kernel = rows @ rows.T
    left = kernel.diagonal().clone()  # squared length of what the chosen rows do not span
    factor = kernel.new_zeros(k, len(rows))
    chosen: list[Tensor] = []
    for step in range(k):
        best = left.where((left > _NOTHING) | left.isneginf(), 0).argmax()[None]
        chosen.append(best[0])
        along = kernel.index_select(0, best)[0] - factor[:step].index_select(1, best).T[0] @ factor[:step]
        length = left.index_select(0, best)
        factor[step] = (along * length.clamp_min(_NOTHING).rsqrt()).where(length > _NOTHING, 0)
        left = (left - factor[step].square()).index_fill(0, best, -torch.inf)
    return torch.stack(chosen)
