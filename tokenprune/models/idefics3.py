"""Idefics3 and SmolVLM: crops between structural tokens, patches shuffled into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from tokenprune.models.base import Layout, VisionCall, locate
from tokenprune.models.crops import Crops
from tokenprune.tokens import Image, IntArray, VisionAttention


class Idefics3(Crops):
    """Every crop is an image of its own: text tokens (its row and column) stand between crops."""

    name = "idefics3"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    examples: ClassVar[tuple[str, ...]] = ("HuggingFaceM4/Idefics3-8B-Llama3",)

    def text_model(self, model: nn.Module) -> nn.Module:
        return self.base(model).text_model  # type: ignore[return-value]

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).vision_model  # type: ignore[return-value]

    def merge(self, model: nn.Module) -> int:
        config: Any = model.config
        return int(config.scale_factor)

    def images(
        self, model: nn.Module, kind: str, ids: IntArray, layouts: Sequence[Layout]
    ) -> list[list[Image]]:
        # Rows with fewer crops are padded with empty ones, which the tower never sees.
        return locate(ids, self.token_id(model, kind), layouts, kind, surplus=True)

    def attend(self, attention: Any, cls: bool, call: VisionCall) -> list[list[VisionAttention]]:
        crops = super().attend(attention, cls, call)
        real = call.tower.get("patch_attention_mask")
        if real is None:
            return crops
        real = real.flatten(1).to(call.outputs[0].device)
        return [[replace(own, real=r)] for (own,), r in zip(crops, real, strict=True)]


class SmolVLM(Idefics3):
    """The same, with SmolVLM's own names; a video's frames are images."""

    name = "smolvlm"
    model_types: ClassVar[tuple[str, ...]] = ("smolvlm",)
    examples: ClassVar[tuple[str, ...]] = ("HuggingFaceTB/SmolVLM2-2.2B-Instruct",)
