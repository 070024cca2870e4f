"""VFlowOpt's importance map: what a few important patches attend to, and how much is in a patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.methods.base import Choice, ScoreMethod
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import VisionAttention

VOTERS = Choice(("attended", "cls"))
FALLBACK = "no voter in a picture: its most attended patches voted"


@dataclass(frozen=True)
class ImportanceMap(ScoreMethod):
    """Scores tokens in the vision tower, blind to the text; once per picture (image, crop or frame of a video).

    With Abar the attention of the layer that yields the features, mean over heads, and c[j] = mean_i Abar[i, j]:
    the voters are K = {j : c[j] > t mean(c)};  I[j] = mean_{k in K} Abar[k, j] + alpha softmax(e)[j],  e[j] the Shannon
    entropy, in bits, of the 256-bin histogram of patch j in 8-bit grey (mean of RGB). Merged patches are averaged.

    Paper: VFlowOpt, arXiv 2508.05211, section 3. Where nothing passes the threshold the release gives NaN; here the
    max(1, round(n / 100)) most attended patches vote, and the report says so. The release takes the entropy of
    normalised pixels, which wrap around; these are the image's own.

    Args:
        t: threshold on received attention, in multiples of its mean; 0: every patch votes.
        alpha: weight of the patches' entropy; 0 leaves it out.
        voters: "attended", or "cls": the CLS token alone votes, in towers that have one.
    """

    name: ClassVar[str] = "importance"
    paper: ClassVar[str] = "arXiv 2508.05211"

    t: float = 0.0
    alpha: float = 0.0
    voters: str = "attended"

    def __post_init__(self) -> None:
        VOTERS.check("voters", self.voters)
        for name, least in (("t", 0.0), ("alpha", -1e6)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1e6:
                raise ConfigError(f"{name} must be a number of at least {least:g}, not {value!r}")

    def needs(self) -> Needs:
        return Needs(vision=self.relevance, pixels=softmax_entropy if self.alpha else None)

    def relevance(self, attention: VisionAttention) -> Tensor:
        """(n, 2): each patch's relevance, and whether the picture had no voter."""
        if self.voters == "cls":
            row = attention.cls_row()
            return torch.stack([row, torch.zeros_like(row)], dim=1)
        received = attention.received()
        if self.t == 0:  # everybody votes, and attention is positive: this is their mean
            return torch.stack([received, torch.zeros_like(received)], dim=1)
        real = torch.ones_like(received, dtype=torch.bool)
        if attention.real is not None:
            real = attention.real[int(attention.has_cls) :]
        mean = (received * real).sum() / real.sum()
        votes = (received > self.t * mean) & real
        most = torch.zeros_like(votes).index_fill_(
            0, received.topk(max(1, round(len(received) / 100))).indices, True
        )
        nobody = ~votes.any()
        relevance = attention.received(torch.where(nobody, most, votes))
        return torch.stack([relevance, nobody.expand_as(relevance).float()], dim=1)

    def score(self, image: ImageTokens) -> Tensor:
        assert image.vision is not None
        relevance = image.vision[:, 0]
        return relevance if image.pixels is None else relevance + self.alpha * image.pixels

    def notes(self, image: ImageTokens) -> dict[str, Tensor]:
        assert image.vision is not None
        return {FALLBACK: (image.vision[:, 1] > 0).any().long()}


def grey_entropy(patches: Tensor) -> Tensor:
    """Shannon entropy in bits of the 256-bin grey histogram of 8-bit RGB patches (m, 3, h, w): (m,) float32."""
    grey = patches.float().mean(1).round().long().flatten(1)
    counts = torch.zeros(len(grey), 256, device=grey.device).scatter_add_(
        1, grey, torch.ones_like(grey, dtype=torch.float32)
    )
    share = counts / grey.shape[1]
    return -torch.special.xlogy(share, share).sum(1) / torch.log(torch.tensor(2.0))


def softmax_entropy(patches: Tensor) -> Tensor:
    """Softmax over a picture's patches of their entropies."""
    return grey_entropy(patches).softmax(0)
