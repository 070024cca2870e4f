"""Mistral 3 (Mistral Small 3.1 and later): a Pixtral tower for pictures of any size, 2 x 2 patches to a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.hashing import digest, mix
from tokenprune.models.base import Family, Layout, VisionCall, VisionTap
from tokenprune.models.crops import SCALES, checked_layer, feature_layer
from tokenprune.models.packed import attend
from tokenprune.tokens import Grid, IntArray, VisionAttention


class Mistral3(Family):
    """A break token, which is text, stands behind each row of placeholders. Pixels are padded to the largest one."""

    name = "mistral3"
    model_types = ("mistral3",)
    examples = ("mistralai/Mistral-Small-3.2-24B-Instruct-2506",)

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return self.base(model).vision_tower  # type: ignore[return-value]

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        pixels = args[0] if args else kwargs["pixel_values"]
        return pixels, torch.as_tensor(args[1] if len(args) > 1 else kwargs["image_sizes"])

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        if inputs.get("pixel_values") is None:
            return {}
        given = inputs.get("image_sizes")
        height, width = inputs["pixel_values"].shape[-2:]
        whole = [(height, width)] * len(inputs["pixel_values"])  # as the tower takes it
        return {"image": torch.as_tensor(whole if given is None else given)}

    def layouts(self, model: nn.Module, kind: str, sizes: IntArray) -> list[Layout]:
        config: Any = model.config
        merge = config.spatial_merge_size
        side = config.vision_config.patch_size * merge
        return [Layout((Grid(1, int(h) // side, int(w) // side, merge),)) for h, w in sizes]

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        # By place, so that a picture has one hash however far it is padded.
        row, column = (torch.arange(n, device=pixels.device) for n in pixels.shape[-2:])
        height, width = sizes.to(pixels.device).view(-1, 2, 1, 1).unbind(1)
        inside = (row[:, None] < height) & (column < width)
        hashes = mix(digest(pixels.movedim(1, -1), 3) + (row[:, None] << 20) + column)
        return (hashes * inside).sum((1, 2))

    def vision_tap(self, model: nn.Module, layer: int | None = None) -> VisionTap:
        tower: Any = self.vision_tower(model)
        layers = tower.transformer.layers
        feature = feature_layer(model.config)
        index = (feature if feature >= 0 else len(layers) + 1 + feature) - 1 if layer is None else layer
        attention = layers[checked_layer(index, len(layers))].attention

        def read(call: VisionCall) -> list[list[VisionAttention]]:
            assert call.sizes is not None
            return attend(attention, call, (call.sizes // tower.config.patch_size).prod(-1).tolist())

        return VisionTap(attention, (attention.q_proj, attention.k_proj), read, packed=True)

    def pixel_scale(self, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return SCALES["clip_vision_model"]

    def patches(self, model: nn.Module, pixels: Tensor, sizes: IntArray | None) -> list[Tensor]:
        config: Any = model.config
        p = config.vision_config.patch_size
        assert sizes is not None
        own = (picture[:, :h, :w] for picture, (h, w) in zip(pixels, sizes.tolist(), strict=True))
        cut = (x.unflatten(-1, (-1, p)).unflatten(-3, (-1, p)) for x in own)
        return [x.permute(1, 3, 0, 2, 4).flatten(0, 1) for x in cut]
