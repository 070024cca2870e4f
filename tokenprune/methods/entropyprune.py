"""EntropyPrune's token score: the matrix entropy of a token's attention heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tokenprune_kernels.dual_gram_entropy import dual_gram_entropy, reference

from tokenprune.errors import ConfigError
from tokenprune.methods.base import Choice, ImageTokens, Needs, ScoreMethod

SOURCE = Choice(("query", "key", "value", "hidden"))
NORMALIZATION = Choice(("none", "trace"))
GRAM = Choice(("dual", "primal"))


@dataclass(frozen=True)
class EntropyPrune(ScoreMethod):
    """Keeps the tokens whose attention heads span the most diverse directions.

    For a token with states X in R^{h x d} (h heads, d = head_dim), centred over heads:
    A = X X^T / h,  lambda = eig(A),  H = - sum lambda log lambda / log h;  the largest H are kept.

    Paper: "EntropyPrune: Matrix Entropy Guided Visual Token Pruning for Multimodal Large Language Models",
    arXiv 2602.17196. The released code does not divide A by its trace, so H depends on a token's scale;
    that is `normalization="none"`, the default here. The von Neumann entropy the paper describes is "trace".

    Args:
        source: "query" / "key" (post-RoPE) or "value" of layer K - 1; "hidden": the input of layer K seen as
            num_attention_heads rows.
        normalization: "none" or "trace".
        gram: "dual" (h x h) or "primal" (d x d, float64): the same non-zero spectrum, for comparison.
        column_groups: average groups of head_dim / 128 neighbouring columns first, as the release does.
    """

    name: ClassVar[str] = "entropyprune"
    paper: ClassVar[str] = "arXiv 2602.17196"
    min_layer: ClassVar[int] = 1

    source: str = "query"
    normalization: str = "none"
    gram: str = "dual"
    column_groups: bool = False

    def __post_init__(self) -> None:
        SOURCE.check("source", self.source)
        NORMALIZATION.check("normalization", self.normalization)
        GRAM.check("gram", self.gram)

    def needs(self) -> Needs:
        return Needs(states=(self.source,))  # type: ignore[arg-type]  # checked in __post_init__

    def score(self, image: ImageTokens) -> Tensor:
        x = self._heads(image)
        if x.shape[-2] < 2:
            raise ConfigError(
                f"source={self.source!r} has a single head here and its entropy is undefined (log 1 = 0); "
                f"use source='query'"
            )
        options = {"normalization": self.normalization, "column_groups": self.column_groups}
        if self.gram == "primal":
            return reference.matrix_entropy(x, gram="primal", **options)  # type: ignore[arg-type]
        return dual_gram_entropy(x, **options)  # type: ignore[arg-type]

    def _heads(self, image: ImageTokens) -> Tensor:
        x: Tensor | None = getattr(image, self.source)
        assert x is not None
        if self.source != "hidden":
            return x
        n, width = x.shape
        if width % image.num_heads:
            raise ConfigError(
                f"source='hidden' needs a hidden size divisible by the {image.num_heads} heads, not {width}"
            )
        return torch.unflatten(x, 1, (image.num_heads, width // image.num_heads))
