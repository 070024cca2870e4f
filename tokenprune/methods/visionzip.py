"""VisionZip: what the vision tower attends to, and the rest merged into a few tokens that stand for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.errors import ConfigError
from tokenprune.methods.base import Method
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import Selection, VisionAttention


@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant and contextual tokens before the LLM; blind to the text.

    Dominant: the tokens that CLS attends to most in the vision layer that yields the features, or, in towers without
    CLS, that receive the most attention, mean over heads. Contextual: of the others, targets at even steps in raster
    order; each of the rest goes to the target whose key (mean over heads) is most like its own, and a target becomes
    the mean of itself and those.

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467, section 3.2. It
    keeps 54 + 10, 108 + 20 or 162 + 30 tokens: 84 % dominant. Its code adds the mean of the rest to a target; the
    paper averages, and so does this. At a later cut the dominant alone are kept.

    Args:
        dominant: share of the tokens kept that are dominant, in (0, 1].
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "arXiv 2412.04467"
    before_llm: ClassVar[bool] = True

    dominant: float = 0.84

    def __post_init__(self) -> None:
        if (
            isinstance(self.dominant, bool)
            or not isinstance(self.dominant, int | float)
            or not 0 < self.dominant <= 1
        ):
            raise ConfigError(f"dominant must be a number above 0, at most 1, not {self.dominant!r}")

    def needs(self) -> Needs:
        return Needs(vision=attended_and_keys, merges=True)

    def select(self, image: ImageTokens, k: int) -> Selection:
        assert image.vision is not None
        score, key = image.vision[:, 0], image.vision[:, 1:]
        contextual = 0 if image.cut else k - max(1, round(self.dominant * k))
        order = (-score).sort(stable=True).indices
        best, rest = order[: k - contextual], order[k - contextual :].sort().values
        if not contextual:
            return Selection(best.sort().values)
        steps = torch.arange(contextual, device=rest.device) * len(rest) // contextual
        target = rest[steps]
        unit = torch.nn.functional.normalize(key.float(), dim=1)
        place = (unit[rest] @ unit[target].T).argmax(1)
        place[steps] = torch.arange(contextual, device=rest.device)  # a target is its own
        members = torch.zeros(contextual, device=rest.device).index_add_(
            0, place, torch.ones_like(score[rest])
        )
        merges = torch.stack([rest, target[place]], dim=1)
        return Selection(torch.cat([best, target]).sort().values, merges, 1 / members[place])


def attended_and_keys(attention: VisionAttention) -> Tensor:
    """(m, 1 + d): how much each patch is attended to, and its key, mean over heads."""
    attended = attention.cls_row() if attention.has_cls else attention.received()
    keys = attention.key[:, int(attention.has_cls) :].mean(0)
    return torch.cat([attended[:, None].float(), keys.float()], dim=1)
