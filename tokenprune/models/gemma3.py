"""Gemma 3: a SigLIP tower pooled to a fixed number of tokens, which attend to each other in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenprune.models.base import runs_of
from tokenprune.models.crops import Crops, side


class Gemma3(Crops):
    """An image is `mm_tokens_per_image` tokens; the crops of pan-and-scan are images of their own."""

    name = "gemma3"
    model_types = ("gemma3",)
    examples = ("google/gemma-3-4b-it", "google/gemma-3-12b-it")

    def merge(self) -> int:
        vision = self.config.vision_config
        return (
            side(vision.image_size) // side(vision.patch_size) // math.isqrt(self.config.mm_tokens_per_image)
        )

    def blocks(self, inputs: Mapping[str, Any], total: int) -> Tensor | None:
        types = inputs.get("token_type_ids")
        return None if types is None else runs_of(types == 1, total)
