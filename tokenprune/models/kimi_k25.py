"""Kimi K2.5 and K2.6: pictures and videos of any size, a video's frames averaged; positions of one axis."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenprune.models.base import Layout
from tokenprune.models.crops import SCALES
from tokenprune.models.packed import Packed
from tokenprune.tokens import Grid, Image, IntArray


class KimiK25(Packed):
    """Its decoder (DeepSeek-V3's latent attention) can be cut; its states cannot be scored."""

    name = "kimi_k25"
    model_types = ("kimi_k25",)
    examples = ("moonshotai/Kimi-K2.6",)
    mrope = False

    def vision_tower(self) -> nn.Module:
        return self.base().vision_tower  # type: ignore[return-value]

    def vision_attentions(self, tower: Any) -> list[nn.Module]:
        return [layer.attn for layer in tower.layers]

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        merge = int(self.config.vision_config.merge_kernel_size[0])
        return [Layout((Grid(1, int(h) // merge, int(w) // merge, merge),)) for _, h, w in sizes]

    def pixel_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return SCALES["siglip_vision_model"]

    def to_tokens(self, patches: Tensor, image: Image) -> Tensor:
        frame = image.grids[0].tokens * image.grids[0].merge ** 2
        whole = patches.reshape(-1, frame, patches.shape[-1]).mean(0, keepdim=True)
        return super().to_tokens(whole, image)
