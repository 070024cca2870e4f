"""What the question's own tokens attend to, where the decoder has read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.methods.base import Choice, ImageTokens, Needs, ScoreMethod, cut_layers
from tokenprune.methods.spread import check_share, on_grid_first
from tokenprune.space import Dimension, OneOf, Real, Setting

POOLING = Choice(("mean", "median", "max"))


@dataclass(frozen=True)
class Question(ScoreMethod):
    """Keeps the tokens that the text behind the last image attends to most, in the layer before the cut.

    With q_i the queries of the text tokens i behind the row's last image and k_j the image's keys, per head a softmax
    over the image's tokens alone, A[h, i, j]; the score of j is the mean over i, pooled over heads. FastV reads one of
    these rows, the last: what answers a question is asked by its words, and the last token is the template's. Over the
    image's tokens alone, so that attention sinks in the text take nothing.

    Source: ours. That more than the last token should rate is SparseVLM's (arXiv 2410.04417, section 3.2); which heads
    agree, CLS-free, differs from image to image, hence the pooling.

    Args:
        pooling: of heads: "mean", "median", or "max".
        skip_last: text tokens at the end that are the template's and do not ask.
        even: share of the tokens kept that lie on an even grid, see `Spread`.
    """

    name: ClassVar[str] = "question"
    min_layer: ClassVar[int] = 1
    reads_text: ClassVar[bool] = True

    pooling: str = "mean"
    skip_last: int = 0
    even: float = 0.0

    def __post_init__(self) -> None:
        POOLING.check("pooling", self.pooling)
        check_share(self.even)
        if isinstance(self.skip_last, bool) or not isinstance(self.skip_last, int) or self.skip_last < 0:
            raise ConfigError(f"skip_last must be a number of tokens, 0 or more, not {self.skip_last!r}")

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension]:
        return {"layer": cut_layers(setting), "pooling": OneOf(POOLING.values), "even": Real(0.0, 1.0, 0.0)}

    def needs(self) -> Needs:
        return Needs(states=("key",), prompt=("query",))

    def score(self, image: ImageTokens) -> Tensor:
        assert image.key is not None and image.prompt is not None and image.prompt.query is not None
        heads = attention_of(self.asking(image), image.key, image.prompt.scale).mean(1)  # (heads, n)
        if self.pooling == "median":
            return heads.median(0).values
        return heads.amax(0) if self.pooling == "max" else heads.mean(0)

    def ranked(self, image: ImageTokens, score: Tensor, k: int) -> Tensor:
        return score if self.even == 0 else on_grid_first(image, score, round(self.even * k))

    def asking(self, image: ImageTokens) -> Tensor:
        """(m, heads, head_dim) queries of the tokens behind the last image; of the last one where none is left."""
        prompt = image.prompt
        assert prompt is not None and prompt.query is not None
        behind = prompt.behind
        if not behind:
            return prompt.query[-1:]
        rows = prompt.query[-behind:]
        return rows[: max(1, behind - self.skip_last)]


def attention_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(heads, m, n) attention of queries (m, heads, head_dim) over the keys (n, key-value heads, head_dim) alone."""
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (torch.einsum("ihd,jhd->hij", query.float(), key) * scale).softmax(-1)
