"""FastV: what the prompt's last token attends to in an early layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from tokenprune.methods.base import ScoreMethod, cut_layers
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.space import Dimension, Setting


@dataclass(frozen=True)
class FastV(ScoreMethod):
    """Keeps the tokens that the prompt's last token attends to most in the layer before the cut, mean over heads.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764. The text speaks of the attention received
    from all tokens; its code takes the last token's row, and so does this. Attention is over the call's own tokens: in
    a later turn the conversation before them is left out of each head's sum.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv 2403.06764"
    min_layer: ClassVar[int] = 1
    reads_text: ClassVar[bool] = True
    published_layers: ClassVar[Mapping[str, int]] = MappingProxyType({"llava": 2})

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension]:
        return {"layer": cut_layers(setting)}

    def needs(self) -> Needs:
        return Needs(last_row=True)

    def score(self, image: ImageTokens) -> Tensor:
        assert image.last_row is not None
        return image.last_row.mean(0)
