"""Llama 4: tiles between separators, chunked attention, rotary embeddings in complex numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.models.base import Image, IntArray, Layout, VisionTap, join
from tokenprune.models.crops import Crops


class Llama4(Crops):
    """An image is its tiles and their thumbnail, between image start and image end; the separators stay."""

    name = "llama4"
    model_types = ("llama4",)
    examples = ("meta-llama/Llama-4-Scout-17B-16E-Instruct",)

    def base(self, model: nn.Module) -> nn.Module:
        return model

    def text_model(self, model: nn.Module) -> nn.Module:
        return model.language_model.model  # type: ignore[union-attr, return-value]

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.vision_model  # type: ignore[return-value]

    def merge(self, model: nn.Module) -> int:
        config: Any = model.config
        return round(1 / config.vision_config.pixel_shuffle_ratio)

    def images(
        self, model: nn.Module, kind: str, ids: IntArray, layouts: Sequence[Layout]
    ) -> list[list[Image]]:
        config: Any = model.config
        rows = []
        for row, tiles in zip(ids, super().images(model, kind, ids, layouts), strict=True):
            starts = np.cumsum(row == config.boi_token_index)
            rows.append(join(tiles, lambda a, b, s=starts: s[a.columns[0]] == s[b.columns[0]]))  # type: ignore[misc]
        return rows

    def temperature(self, attention: nn.Module, columns: Tensor) -> Tensor | None:
        layer: Any = attention
        if layer.use_rope or not layer.attn_temperature_tuning:
            return None
        return torch.log1p(torch.floor((columns.float() + 1) / layer.floor_scale)) * layer.attn_scale + 1

    def vision_tap(self, model: nn.Module) -> VisionTap:
        raise UnsupportedModelError("the vision attention of llama4 models is not available yet")
