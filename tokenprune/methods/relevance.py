"""What the question's words are like, before the decoder has read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import Choice, ScoreMethod, check_count, check_flag
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.methods.spread import check_share, on_grid_first
from tokenprune.space import Dimension, OneOf, Real, Setting

POOLING = Choice(("max", "mean"))


@dataclass(frozen=True)
class Relevance(ScoreMethod):
    """Keeps the tokens whose features are most like the question's word embeddings, and an even grid; at any cut.

    With f_i the projected features and w_j the word embeddings of the text behind the row's last image: the score of i
    is the maximum (or mean) over j of cos(f_i - mean f, w_j - mean w), means over the image and over the words; a share
    of what is kept lies on an even grid, so that no part of the picture is left out.

    Source: ours, after F3A (arXiv 2605.16359), which matches cues of the question to tokens before the LLM and covers
    the rest, and TOPS (arXiv 2606.27161). Of F3A's sensing heads, refinement and recovery nothing is here.

    Args:
        pooling: over words: "max" or "mean".
        centred: whether means are taken off first: all of a picture's features have much in common.
        even: share of the tokens kept that lie on an even grid, see `Spread`.
        skip_last: text tokens at the end that are the template's and do not ask.
    """

    name: ClassVar[str] = "relevance"
    paper: ClassVar[str] = "after arXiv 2605.16359"
    before_llm: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    pooling: str = "max"
    centred: bool = True
    even: float = 0.5
    skip_last: int = 0

    def __post_init__(self) -> None:
        POOLING.check("pooling", self.pooling)
        check_flag("centred", self.centred)
        check_share(self.even)
        check_count("skip_last", self.skip_last)

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension]:
        return {"pooling": OneOf(POOLING.values), "even": Real(0.0, 1.0, 0.5)}

    def needs(self) -> Needs:
        return Needs(features=True, words=True)

    def score(self, image: ImageTokens) -> Tensor:
        text = image.prompt
        assert image.features is not None and text is not None
        words = text.asking[: max(1, len(text.asking) - self.skip_last)].float()
        features = image.features.float()
        if self.centred:
            features = features - features.mean(0)
            words = words - words.mean(0) if len(words) > 1 else words
        normal = torch.nn.functional.normalize
        like = normal(features, dim=1) @ normal(words.to(features.device), dim=1).T
        return like.amax(1) if self.pooling == "max" else like.mean(1)

    def ranked(self, image: ImageTokens, score: Tensor, k: int) -> Tensor:
        return score if self.even == 0 else on_grid_first(image, score, round(self.even * k))
