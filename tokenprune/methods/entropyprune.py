"""EntropyPrune's token score: the matrix entropy of a token's attention heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.budget import Cut, Keep
from tokenprune.errors import ConfigError
from tokenprune.estimators import ESTIMATORS, SpectralEstimator, make_estimator
from tokenprune.methods.base import Choice, ScoreMethod, check_flag, cut_layers
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.space import Dimension, OneOf, Setting
from tokenprune.tokens import DecoderShape
from tokenprune_kernels.dual_gram_entropy import dual_gram_entropy, reference
from tokenprune_kernels.dual_gram_entropy.arguments import EIGENVALUE_FLOOR

SOURCE = Choice(("query", "key", "value", "hidden"))
NORMALIZATION = Choice(("none", "trace"))
GRAM = Choice(("dual", "primal"))
ESTIMATOR = Choice(tuple(name for name, cls in ESTIMATORS.items() if cls.spectral))


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
        estimator: what is taken of the eigenvalues: "von_neumann" is H above; any other spectral estimator of
            `tokenprune.estimators` (with its default parameters, in float64). "effective_rank" ranks as H does.
        lookahead: K, for a cut before the LLM (`layer=0`): the states are what layers 0 to K - 1 make of the image's
            tokens alone. The average can be any, and the whole cache shrinks; it costs K layers on the image. 0: none.
        column_groups: average groups of head_dim / 128 neighbouring columns first, as the release does.
    """

    name: ClassVar[str] = "entropyprune"
    paper: ClassVar[str] = "arXiv 2602.17196"
    min_layer: ClassVar[int] = 1
    pointwise: ClassVar[bool] = True

    source: str = "query"
    normalization: str = "none"
    gram: str = "dual"
    estimator: str = "von_neumann"
    column_groups: bool = False
    lookahead: int = 0

    def __post_init__(self) -> None:
        SOURCE.check("source", self.source)
        NORMALIZATION.check("normalization", self.normalization)
        GRAM.check("gram", self.gram)
        ESTIMATOR.check("estimator", self.estimator)
        check_flag("column_groups", self.column_groups)
        ahead = self.lookahead
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 0:
            raise ConfigError(f"lookahead must be a number of layers, 0 for none, not {ahead!r}")

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension]:
        return {
            "layer": cut_layers(setting),
            "source": OneOf(SOURCE.values),
            "normalization": OneOf(NORMALIZATION.values),
            "estimator": OneOf(ESTIMATOR.values),
        }

    def needs(self) -> Needs:
        # The Gram matrix over heads does not see a turn of all heads by the same angles.
        return Needs(states=(self.source,), ahead=self.lookahead or None, rotary=False)  # type: ignore[arg-type]

    def default_cuts(
        self, family: str, num_layers: int, keep: Keep | None = None
    ) -> tuple[tuple[Cut, ...], str]:
        if self.lookahead:
            return (Cut(0),), f"before the LLM, looking {self.lookahead} layers ahead"
        return super().default_cuts(family, num_layers, keep)

    def check(self, shape: DecoderShape) -> None:
        heads = shape.num_key_value_heads if self.source in ("key", "value") else shape.num_heads
        width = shape.head_dim
        if self.source == "hidden":
            if shape.hidden_size % heads:
                raise ConfigError(
                    f"source='hidden' needs a hidden size divisible by the {heads} heads, not {shape.hidden_size}; "
                    f"use source='query'"
                )
            width = shape.hidden_size // heads
        if heads < 2:
            raise ConfigError(
                f"source={self.source!r} has a single head in this model and its entropy is undefined (log 1 = 0); "
                f"use source='query'"
            )
        if self.column_groups and width % 128:
            raise ConfigError(
                f"column_groups=True needs a head_dim that is a multiple of 128, not {width}; leave it out"
            )

    def score(self, image: ImageTokens) -> Tensor:
        x = getattr(image, self.source)
        if self.source == "hidden":
            x = x.unflatten(1, (image.num_heads, -1))
        options: dict[str, Any] = {"normalization": self.normalization, "column_groups": self.column_groups}
        # exp(H) ranks tokens as H does, and overflows where the trace is not divided out.
        is_entropy = self.estimator in ("von_neumann", "effective_rank")
        if is_entropy and self.gram == "dual":
            return dual_gram_entropy(x, **options)
        if self.estimator == "renyi" and self.gram == "dual":  # of order 2, which needs no eigenvalues
            return dual_gram_entropy(x, **{**options, "normalization": "trace"}, order=2)
        gram: Any = self.gram
        if is_entropy:
            return reference.matrix_entropy(x, gram=gram, **options)
        eigenvalues = reference.spectrum(x, gram=gram, **options)
        estimator = make_estimator(self.estimator)
        assert isinstance(estimator, SpectralEstimator)
        # Heads that are all equal have no spectrum (every eigenvalue at the clamp): the least diverse there is.
        empty = (eigenvalues == EIGENVALUE_FLOOR).all(-1)
        return estimator.of_spectrum(eigenvalues).masked_fill(empty, -torch.inf)
