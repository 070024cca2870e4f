"""What the question's own tokens attend to, where the decoder has read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.methods.base import Choice, ScoreMethod, check_count, cut_layers
from tokenprune.methods.seen import ImageTokens, Needs
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
        baseline: how much of what these attend to is taken off the score: what is attended to whatever is asked.
        sinks: tokens whose state is longer than this many times the image's median come last; 0 lets them be.
        even: share of the tokens kept that lie on an even grid, see `Spread`.
    """

    name: ClassVar[str] = "question"
    min_layer: ClassVar[int] = 1
    reads_text: ClassVar[bool] = True

    pooling: str = "mean"
    skip_last: int = 0
    baseline: float = 0.0
    sinks: float = 0.0
    even: float = 0.0

    def __post_init__(self) -> None:
        POOLING.check("pooling", self.pooling)
        check_share(self.even)
        for name in ("baseline", "sinks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e6:
                raise ConfigError(f"{name} must be a number, 0 or more, not {value!r}")
        if self.baseline and not self.skip_last:
            raise ConfigError(
                "baseline takes off what the template attends to: say skip_last, its length, too"
            )
        check_count("skip_last", self.skip_last)

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension]:
        return {"layer": cut_layers(setting), "pooling": OneOf(POOLING.values), "even": Real(0.0, 1.0, 0.0)}

    def needs(self) -> Needs:
        return Needs(states=("key", "hidden") if self.sinks else ("key",), prompt=("query",))

    def score(self, image: ImageTokens) -> Tensor:
        assert image.key is not None and image.prompt is not None
        asking, template = self.asking(image)
        heads = attention_of(asking, image.key, image.prompt.scale).mean(1)  # (heads, n)
        if self.baseline and len(template):
            heads = heads - self.baseline * attention_of(template, image.key, image.prompt.scale).mean(1)
        pooled = heads.amax(0) if self.pooling == "max" else heads.mean(0)
        if self.pooling == "median":
            pooled = heads.median(0).values
        if self.sinks:
            assert image.hidden is not None
            length = image.hidden.float().norm(dim=1)
            pooled = pooled.masked_fill((length > self.sinks * length.median()).to(pooled.device), -torch.inf)
        return pooled

    def ranked(self, image: ImageTokens, score: Tensor, k: int) -> Tensor:
        return score if self.even == 0 else on_grid_first(image, score, round(self.even * k))

    def asking(self, image: ImageTokens) -> tuple[Tensor, Tensor]:
        """(m, heads, head_dim) queries of the tokens behind the last image, or of the last one where none is; and
        those of the template among them."""
        assert image.prompt is not None and image.prompt.query is not None
        rows = image.prompt.query[-(image.prompt.behind or 1) :]
        asked = max(1, len(rows) - self.skip_last)
        return rows[:asked], rows[asked:]


def attention_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(heads, m, n) attention of queries (m, heads, head_dim) over the keys (n, key-value heads, head_dim) alone."""
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (torch.einsum("ihd,jhd->hij", query.float(), key) * scale).softmax(-1)
