"""LLaVA-1.5: a CLIP or SigLIP tower, every patch one token, any Llama-like text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenprune.errors import ConfigError, UnsupportedModelError
from tokenprune.hashing import digest
from tokenprune.methods.base import Grid
from tokenprune.models.base import Family, Image, IntArray, VisionTap, locate


class Llava(Family):
    name = "llava"
    model_types = ("llava",)
    examples = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf")
    published_layer = 2

    def images(
        self, model: nn.Module, ids: IntArray, inputs: Mapping[str, Any], host: list[IntArray]
    ) -> list[list[Image]]:
        config: Any = model.config
        pixels = inputs.get("pixel_values")
        if pixels is None:
            raise ConfigError("precomputed image features cannot be pruned; pass pixel_values")
        if pixels.ndim != 4 or inputs.get("image_sizes") is not None:
            raise UnsupportedModelError(
                "llava models are pruned with one fixed-size crop per image: pixel_values (images, 3, H, W)"
            )
        if _keeps_cls(model, inputs):
            raise UnsupportedModelError(
                "vision_feature_select_strategy='full' with a CLS token is not supported; use 'default'"
            )
        patch = config.vision_config.patch_size
        grid = Grid(1, pixels.shape[2] // patch, pixels.shape[3] // patch)
        return locate(ids, config.image_token_id, [grid] * pixels.shape[0])

    def pixel_digests(self, inputs: Mapping[str, Any], rows: list[list[Image]]) -> dict[tuple[str, int], Tensor]:
        return {("image", i): d for i, d in enumerate(digest(inputs["pixel_values"]).unbind())}

    def vision_tap(self, model: nn.Module) -> VisionTap:
        config: Any = model.config
        tower: Any = self.base(model).vision_tower
        tower = getattr(tower, "vision_model", tower)
        layers = tower.encoder.layers
        feature = config.vision_feature_layer
        feature = feature if isinstance(feature, int) else feature[-1]
        # hidden_states[i] is the output of layer i - 1; entry 0 is the embedding.
        layer = (feature if feature >= 0 else len(layers) + 1 + feature) - 1
        if layer < 0:
            raise UnsupportedModelError("vision_feature_layer=0 reads the embeddings: there is no attention to use")
        attention = layers[layer].self_attn
        return VisionTap(
            attention.q_proj, attention.k_proj, attention.num_heads, attention.scale, _tower_has_cls(model)
        )


def _tower_has_cls(model: nn.Module) -> bool:
    return any(name.endswith("class_embedding") for name, _ in model.named_parameters())


def _keeps_cls(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    config: Any = model.config
    strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    return bool(strategy == "full" and config.vision_config.model_type.startswith("clip"))
