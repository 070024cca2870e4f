"""The control that keeps everything: the wrapped model, unpruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune.methods.base import Method
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class NoPruning(Method):
    """Keeps every token. It takes no budget, so a table's unpruned row runs the same path as the others."""

    name: ClassVar[str] = "none"

    def needs(self) -> Needs:
        return Needs()

    def select(self, image: ImageTokens, k: int) -> Selection:
        return Selection(torch.arange(image.n, device=image.raster.device))
