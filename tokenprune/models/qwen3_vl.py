"""Qwen3-VL: Qwen2.5-VL with deep-stack features, and timestamps between the frames of a video."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tokenprune.models.crops import SCALES
from tokenprune.models.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """After each of its first layers, features of another vision layer are added to the visual tokens' states."""

    name = "qwen3_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")
    examples: ClassVar[tuple[str, ...]] = ("Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct")

    def pixel_scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return SCALES["siglip_vision_model"]

    def layer_features(
        self, inputs: dict[str, Any], first: int
    ) -> tuple[dict[str, Any], dict[int, tuple[Tensor, Tensor]]]:
        features, columns = inputs.get("deepstack_visual_embeds"), inputs.get("visual_pos_masks")
        if features is None or columns is None:
            return inputs, {}
        taken = {i: (columns, own) for i, own in enumerate(features) if i >= first}
        return {**inputs, "deepstack_visual_embeds": features[:first]}, taken
