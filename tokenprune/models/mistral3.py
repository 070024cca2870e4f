"""Mistral 3 (Mistral Small 3.1 and later): a Pixtral tower for pictures of any size, 2 x 2 patches to a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.hashing import digest, mix
from tokenprune.models.base import Layout
from tokenprune.models.packed import Packed
from tokenprune.tokens import Grid, IntArray


class Mistral3(Packed):
    """A break token, which is text, stands behind each row of placeholders. Pixels are padded to the largest one."""

    name = "mistral3"
    model_types = ("mistral3",)
    examples = ("mistralai/Mistral-Small-3.2-24B-Instruct-2506",)
    mrope = False

    def vision_tower(self) -> nn.Module:
        return self.base().vision_tower  # type: ignore[return-value]

    def tower_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        named = {**kwargs, **dict(zip(("pixel_values", "image_sizes"), args, strict=False))}
        return named["pixel_values"], self.sizes(named)["image"]

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        pixels, given = inputs.get("pixel_values"), inputs.get("image_sizes")
        if pixels is None:
            return {}
        # Where nothing is said, the tower takes pictures for whole.
        return {"image": torch.as_tensor([pixels.shape[-2:]] * len(pixels) if given is None else given)}

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        merge = self.config.spatial_merge_size
        shapes = (sizes // (self.config.vision_config.patch_size * merge)).tolist()
        return [Layout((Grid(1, height, width, merge),)) for height, width in shapes]

    def counts(self, sizes: IntArray) -> list[int]:
        return super().counts(sizes // self.config.vision_config.patch_size)

    def digests(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        # By place, so that a picture has one hash however far it is padded.
        row, column = (torch.arange(n, device=pixels.device) for n in pixels.shape[-2:])
        height, width = sizes.to(pixels.device).view(-1, 2, 1, 1).unbind(1)
        hashes = mix(digest(pixels.movedim(1, -1), 3) + (row[:, None] << 20) + column)
        return (hashes * ((row[:, None] < height) & (column < width))).sum((1, 2))

    def vision_attentions(self, tower: Any) -> list[nn.Module]:
        return [layer.attention for layer in tower.transformer.layers]

    def patches(self, pixels: Tensor, sizes: IntArray | None) -> list[Tensor]:
        p = self.config.vision_config.patch_size
        assert sizes is not None
        own = (picture[:, :h, :w] for picture, (h, w) in zip(pixels, sizes.tolist(), strict=True))
        cut = (x.unflatten(-1, (-1, p)).unflatten(-3, (-1, p)) for x in own)
        return [x.permute(1, 3, 0, 2, 4).flatten(0, 1) for x in cut]
