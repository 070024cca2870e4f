"""Llama 4: tiles between separators, chunked attention, rotary embeddings in complex numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.models.base import Layout, VisionCall, join
from tokenprune.models.crops import Crops, by_head
from tokenprune.tokens import Image, IntArray, VisionAttention


class Llama4(Crops):
    """An image is its tiles and their thumbnail, between image start and image end; the separators stay."""

    name = "llama4"
    model_types = ("llama4",)
    examples = ("meta-llama/Llama-4-Scout-17B-16E-Instruct",)

    def base(self) -> nn.Module:
        return self.model

    def text_model(self) -> nn.Module:
        return self.model.language_model.model

    def vision_tower(self) -> nn.Module:
        return self.model.vision_model

    def merge(self) -> int:
        return round(1 / self.config.vision_config.pixel_shuffle_ratio)

    def images(self, kind: str, ids: IntArray, layouts: Sequence[Layout]) -> list[list[Image]]:
        rows = []
        for row, tiles in zip(ids, super().images(kind, ids, layouts), strict=True):
            starts = np.cumsum(row == self.config.boi_token_index)
            rows.append(join(tiles, lambda a, b, s=starts: s[a.columns[0]] == s[b.columns[0]]))  # type: ignore[misc]
        return rows

    def vision_attentions(self, tower: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in tower.model.layers]

    def attend(self, attention: Any, cls: bool, call: VisionCall) -> list[list[VisionAttention]]:
        rotary = call.attention["freqs_ci"]
        # The CLS token comes last in this tower.
        query, key = (turn(by_head(x, attention.num_heads), rotary).roll(1, dims=2) for x in call.outputs)
        return [[VisionAttention(q, k, attention.scaling, cls)] for q, k in zip(query, key, strict=True)]


def turn(x: Tensor, rotary: Tensor) -> Tensor:
    """Apply the vision layers' rotary embedding, complex (m, 1, d / 2), to x (crops, heads, m, d)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotary.to(x.device).squeeze(1)).flatten(-2).type_as(x)
