"""LLaVA-1.5: a CLIP or SigLIP tower, every patch one token, any Llama-like text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from tokenprune.errors import UnsupportedModeError
from tokenprune.models.crops import Crops, has_cls


class Llava(Crops):
    """One fixed-size image gives (H / patch) x (W / patch) tokens, nothing around them."""

    name = "llava"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    examples: ClassVar[tuple[str, ...]] = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")

    def merge(self) -> int:
        return 1

    def check_call(self, inputs: Mapping[str, Any]) -> None:
        if inputs.get("image_sizes") is not None:
            raise UnsupportedModeError(
                "llava models are pruned with one fixed-size crop per image; leave image_sizes out"
            )
        check_features(self.config, self.vision_tower(), inputs)


def check_features(config: Any, tower: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse features other than those the config promises."""
    for name in ("vision_feature_layer", "vision_feature_layers"):
        feature = inputs.get(name)
        if feature is not None and feature != getattr(config, name, None):
            raise UnsupportedModeError(f"set {name} in the config before wrapping, not in the call")
    strategy = inputs.get("vision_feature_select_strategy") or getattr(
        config, "vision_feature_select_strategy", None
    )
    if strategy == "full" and has_cls(tower):
        raise UnsupportedModeError("vision_feature_select_strategy='full' keeps the CLS token; use 'default'")
