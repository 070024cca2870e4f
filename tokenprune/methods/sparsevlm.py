"""SparseVLM: what the words that speak of the picture attend to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from tokenprune.methods.base import ScoreMethod
from tokenprune.methods.question import attention_of
from tokenprune.methods.seen import ImageTokens, Needs


@dataclass(frozen=True)
class SparseVLM(ScoreMethod):
    """Text raters: the attention that words relevant to the picture pay to its tokens, mean over heads and words.

    With H_v the projected features and H_q the word embeddings of the row's text: R = mean over image tokens of
    softmax over words (H_v H_q^T); raters are the words with R_i >= mean(R). The score of token j is the mean over
    raters i of A[i, j], the softmax over the image's tokens in the layer before the cut.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv 2410.04417,
    equations 4 to 6. Its rank-based count per layer and its recycling of dropped tokens are left out: budgets are what
    is asked, and `Recycle` goes around any score. Only words behind the picture can attend to it.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "arXiv 2410.04417"
    min_layer: ClassVar[int] = 1
    reads_text: ClassVar[bool] = True
    published_layers: ClassVar[Mapping[str, int]] = MappingProxyType({"llava": 2})

    def needs(self) -> Needs:
        return Needs(states=("key",), prompt=("query",), words=True, features=True)

    def score(self, image: ImageTokens) -> Tensor:
        text = image.prompt
        assert image.key is not None and image.features is not None
        assert text is not None and text.query is not None and text.words is not None
        behind = text.behind or 1
        words = text.words[-behind:].float()
        relevance = (image.features.float() @ words.T).softmax(1).mean(0)
        rates = relevance >= relevance.mean()
        attention = attention_of(text.query[-behind:], image.key, text.scale).mean(0)
        return (attention * rates[:, None]).sum(0) / rates.sum()
