"""DART: tokens that repeat least what a few pivots say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import Method, check_count
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class DART(Method):
    """Keeps a few pivots, and for each of them, in turn, the tokens whose hidden states are least like its own.

    Pivots are the tokens with the largest keys, ||k||_1 over all heads in the layer before the cut: `image_pivots` of
    the image, which are kept, and `text_pivots` of the text behind it. What is left of the budget is shared out among
    the pivots; each takes, of the tokens not yet kept, those with the smallest cosine to it. Equal ones: the lower
    index.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", arXiv
    2502.11494, section 4 (4 + 4 pivots, layer 2). The release takes the same number for each pivot and so misses the
    budget by a few tokens; here the first pivots take one more. It compares the states behind the decoder's final norm;
    here as they enter the layer.

    Args:
        image_pivots: how many pivots are of the image, 1 or more.
        text_pivots: how many are of the text behind it.
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "arXiv 2502.11494"
    min_layer: ClassVar[int] = 1
    reads_text: ClassVar[bool] = True
    published_layers: ClassVar[Mapping[str, int]] = MappingProxyType({"llava": 2, "qwen2_vl": 2})

    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        check_count("image_pivots", self.image_pivots, 1)
        check_count("text_pivots", self.text_pivots)

    def needs(self) -> Needs:
        return Needs(states=("key", "hidden"), prompt=("key", "hidden"))

    def select(self, image: ImageTokens, k: int) -> Selection:
        assert image.key is not None and image.hidden is not None and image.prompt is not None
        assert image.prompt.key is not None and image.prompt.hidden is not None
        start = len(image.prompt.key) - image.prompt.behind
        own = largest(image.key, min(self.image_pivots, k))
        asking = start + largest(image.prompt.key[start:], min(self.text_pivots, image.prompt.behind))
        states = torch.cat([image.hidden[own], image.prompt.hidden[asking]]).float()
        unit = torch.nn.functional.normalize(image.hidden.float(), dim=1)
        like = torch.nn.functional.normalize(states, dim=1) @ unit.T
        like = like.index_fill(1, own, torch.inf)
        each, more = divmod(k - len(own), len(states))
        kept = [own]
        for i in range(len(states)):
            found = like[i].argsort(stable=True)[: each + (i < more)]
            like.index_fill_(1, found, torch.inf)
            kept.append(found)
        return Selection(torch.cat(kept).sort().values.to(image.raster.device))


def largest(key: Tensor, k: int) -> Tensor:
    """(k,) indices of the keys (n, heads, head_dim) with the largest L1 norm; of equal ones the lower index."""
    return key.float().abs().sum((1, 2)).argsort(descending=True, stable=True)[:k]
