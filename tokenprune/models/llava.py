"""LLaVA-1.5: a CLIP or SigLIP tower, every patch one token, any Llama-like text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModeError, UnsupportedModelError
from tokenprune.hashing import digest
from tokenprune.methods.base import Grid
from tokenprune.models.base import Family, IntArray, VisionTap


class Llava(Family):
    """One fixed-size image gives (H / patch) x (W / patch) tokens, nothing around them."""

    name = "llava"
    model_types = ("llava",)
    text_types = ("llama", "mistral", "qwen2")  # no norm between projection and rotary embedding, rotate-half
    examples = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")
    published_layer = 2

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).vision_tower  # type: ignore[return-value]

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        pixels = args[0] if args else kwargs["pixel_values"]
        return pixels, _sizes(pixels)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        pixels = inputs.get("pixel_values")
        return {} if pixels is None else {"image": _sizes(pixels)}

    def grid(self, model: nn.Module, size: IntArray) -> Grid:
        config: Any = model.config
        patch = config.vision_config.patch_size
        return Grid(1, int(size[1]) // patch, int(size[2]) // patch)

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        return digest(pixels)

    def check_call(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        config: Any = model.config
        feature = inputs.get("vision_feature_layer")
        if feature is not None and feature != config.vision_feature_layer:
            raise UnsupportedModeError(
                "set vision_feature_layer in the config before wrapping, not in the call"
            )
        if inputs.get("image_sizes") is not None:
            raise UnsupportedModeError(
                "llava models are pruned with one fixed-size crop per image; leave image_sizes out"
            )
        strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
        if strategy == "full" and _has_cls(self.vision_tower(model)):
            raise UnsupportedModeError(
                "vision_feature_select_strategy='full' keeps the CLS token; use 'default'"
            )

    def vision_tap(self, model: nn.Module) -> VisionTap:
        config: Any = model.config
        tower: Any = self.vision_tower(model)
        layers = getattr(tower, "vision_model", tower).encoder.layers
        feature = config.vision_feature_layer
        feature = feature if isinstance(feature, int) else feature[-1]
        # hidden_states[i] is the output of layer i - 1; entry 0 is the embedding.
        layer = (feature if feature >= 0 else len(layers) + 1 + feature) - 1
        if layer < 0:
            raise UnsupportedModelError(
                "vision_feature_layer=0 reads the embeddings: there is no attention to use"
            )
        attention = layers[layer].self_attn
        return VisionTap(
            attention.q_proj, attention.k_proj, attention.num_heads, attention.scale, _has_cls(tower)
        )


def _has_cls(tower: nn.Module) -> bool:
    return any(name.endswith("class_embedding") for name, _ in tower.named_parameters())


def _sizes(pixels: Tensor) -> Tensor:
    count, _, height, width = pixels.shape
    return torch.tensor([[1, height, width]]).expand(count, -1)
