"""What most families share: a tower that is given square crops (N, 3, H, W) and makes a fixed grid of each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.hashing import digest
from tokenprune.methods.base import Grid
from tokenprune.models.base import Family, IntArray, Layout, VisionTap


class Crops(Family):
    """Every crop of (H, W) pixels gives (H / patch / merge) x (W / patch / merge) tokens."""

    @abstractmethod
    def merge(self, model: nn.Module) -> int:
        """Patches per side that are merged into one token."""

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).vision_tower  # type: ignore[return-value]

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        pixels = args[0] if args else kwargs["pixel_values"]
        return pixels, crop_sizes(pixels)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        pixels = inputs.get("pixel_values")
        return {} if pixels is None else {"image": crop_sizes(pixels)}

    def grid(self, model: nn.Module, height: int, width: int) -> Grid:
        """The tokens of one crop of so many pixels."""
        config: Any = model.config
        patch, merge = side(config.vision_config.patch_size), self.merge(model)
        return Grid(1, height // patch // merge, width // patch // merge, merge)

    def layouts(self, model: nn.Module, kind: str, sizes: IntArray) -> list[Layout]:
        return [Layout((self.grid(model, int(h), int(w)),)) for h, w in sizes]

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        return digest(pixels)

    def vision_layer(self, model: nn.Module) -> nn.Module:
        """The layer of the vision tower whose output becomes the features."""
        config: Any = model.config
        layers = vision_layers(self.vision_tower(model))
        feature = getattr(config, "vision_feature_layer", -1)
        feature = feature if isinstance(feature, int) else feature[-1]
        # hidden_states[i] is the output of layer i - 1; entry 0 is the embedding.
        index = (feature if feature >= 0 else len(layers) + 1 + feature) - 1
        if index < 0:
            raise UnsupportedModelError(
                "vision_feature_layer=0 reads the embeddings: there is no attention to use"
            )
        return layers[index]

    def vision_tap(self, model: nn.Module) -> VisionTap:
        attention: Any = self.vision_layer(model).self_attn
        cls = has_cls(self.vision_tower(model))
        return VisionTap(attention.q_proj, attention.k_proj, attention.num_heads, attention.scale, cls)


def crop_sizes(pixels: Tensor) -> Tensor:
    """(N, 2) height and width of (..., 3, H, W) crops."""
    height, width = pixels.shape[-2:]
    return torch.tensor([[height, width]]).expand(pixels.shape[:-3].numel(), -1)


def side(size: Any) -> int:
    """A patch or image size that configs give as an int or as two equal ones."""
    return int(size if isinstance(size, int) else size[0])


def vision_layers(tower: nn.Module) -> nn.ModuleList:
    inner: Any = getattr(tower, "vision_model", tower)
    return inner.encoder.layers


def has_cls(tower: nn.Module) -> bool:
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())
