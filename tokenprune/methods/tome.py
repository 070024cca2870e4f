"""ToMe: tokens that are alike become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.methods.base import Method, check_flag
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class ToMe(Method):
    """Bipartite soft matching of the projected features before the LLM; nothing is dropped. Blind to the text.

    In rounds until k are left: the tokens, in raster order, are dealt out in turn to A and B; each of A is matched with
    the one of B most like it (cosine), and the r matches most alike are merged, r = min(half, what is too many). Merged
    tokens are means over all that went into them, and log(size) is added to their attention logits.

    Paper: "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3: there in every layer of a vision
    transformer, by the attention's keys; here once, between tower and decoder, by what the projector put out. The place
    of a merged token is that of its member in B. Equal matches: the lower index of A.

    Args:
        size_term: whether the log of their sizes is added to attention logits; flash attention cannot.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "arXiv 2210.09461"
    before_llm: ClassVar[bool] = True

    size_term: bool = True

    def __post_init__(self) -> None:
        check_flag("size_term", self.size_term)

    def needs(self) -> Needs:
        return Needs(features=True, merges=True, bias=self.size_term)

    def select(self, image: ImageTokens, k: int) -> Selection:
        assert image.features is not None
        sizes = image.sizes
        place = match(image.features.float(), sizes, k)
        keep = (place == torch.arange(image.n, device=place.device)).long().sort(descending=True, stable=True)
        kept = keep.indices[:k].sort().values
        total = torch.zeros_like(sizes).index_add_(0, place, sizes)
        merges = torch.stack([torch.arange(image.n, device=place.device), place], dim=1)
        bias = total[kept].log() if self.size_term else None
        return Selection(kept, merges, sizes / total[place], bias)


def match(features: Tensor, sizes: Tensor, k: int) -> Tensor:
    """(n,) where each of n tokens goes: k are their own place.

    Args:
        features: (n, d) float.
        sizes: (n,) how many original tokens each stands for.
        k: tokens left, 1 <= k <= n.
    """
    n, device = len(features), features.device
    place = torch.arange(n, device=device)
    left = place
    total = features * sizes[:, None]
    mass = sizes.clone()
    while len(left) > k:
        a, b = left[::2], left[1::2]
        r = min(len(a) if len(a) == len(b) else len(a) - 1, len(b), len(left) - k)
        unit = torch.nn.functional.normalize(total, dim=1)
        alike, partner = (unit[a] @ unit[b].T).max(1)
        order = (-alike).sort(stable=True).indices
        goes, to = a[order[:r]], b[partner[order[:r]]]
        total.index_add_(0, to, total[goes])
        mass.index_add_(0, to, mass[goes])
        step = torch.arange(n, device=device).index_copy_(0, goes, to)
        place = step[place]
        left = torch.cat([a[order[r:]], b]).sort().values
    return place
