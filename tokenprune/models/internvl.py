"""InternVL (the transformers classes): tiles of one size, 2 x 2 patches shuffled into a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tokenprune.models.base import Layout, join
from tokenprune.models.crops import Crops
from tokenprune.tokens import Image, IntArray


class InternVL(Crops):
    """An image is its tiles (and their thumbnail, last), one run of placeholders; a video's frames are images."""

    name = "internvl"
    model_types = ("internvl",)
    examples = ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3_5-8B-HF")

    def merge(self) -> int:
        return round(1 / self.config.downsample_ratio)

    def images(self, kind: str, ids: IntArray, layouts: Sequence[Layout]) -> list[list[Image]]:
        tiles = super().images(kind, ids, layouts)
        return [join(row, lambda a, b: int(b.columns[0]) == int(a.columns[-1]) + 1) for row in tiles]

    def vision_attentions(self, tower: Any) -> list[nn.Module]:
        return [layer.attention for layer in tower.encoder.layer]

    def vision_sources(self, attention: Any) -> tuple[nn.Module, nn.Module]:
        return attention.q_norm, attention.k_norm  # identities in most checkpoints
