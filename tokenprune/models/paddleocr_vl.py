"""PaddleOCR-VL: Qwen2-VL's layout around a SigLIP tower. Pictures only."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenprune.models.packed import Packed


class PaddleOCRVL(Packed):
    """Pages of print: what is dropped cannot be read, so try it on pages of your own first."""

    name = "paddleocr_vl"
    model_types = ("paddleocr_vl",)
    examples = ("PaddlePaddle/PaddleOCR-VL",)

    def vision_attentions(self, tower: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in tower.vision_model.encoder.layers]
