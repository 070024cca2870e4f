"""LLaVA-NeXT (1.6): a base view and tiles of any resolution, a newline token after every row of the tiled image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tokenprune.errors import ConfigError
from tokenprune.models.base import BoolArray, Layout
from tokenprune.models.crops import Crops
from tokenprune.models.llava import check_features
from tokenprune.tokens import Grid, Image, IntArray

# pack_image_features puts its lengths on the device of the first features: a wait for the device, if it is another.
_FIRST = torch.zeros(1, 1, 1)


class LlavaNext(Crops):
    """The layout is asked of the model's own `pack_image_features`, on features that are one number wide."""

    name = "llava_next"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    examples: ClassVar[tuple[str, ...]] = (
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-hf/llava-v1.6-mistral-7b-hf",
    )
    sizes_ahead = True

    def merge(self) -> int:
        return 1

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        if inputs.get("pixel_values") is None:
            return {}
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise ConfigError(
                "images were given without image_sizes; make the inputs with the model's own processor"
            )
        return {"image": torch.as_tensor(sizes)}

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        return [self.layout(torch.from_numpy(size), self.tiles(size)) for size in sizes]

    def tiles(self, size: IntArray) -> int:
        """Pictures the tower is given for an image of (height, width) pixels, the base view included."""
        return image_size_to_num_patches(
            size.tolist(), self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )

    def layout(self, size: Tensor, tiles: int) -> Layout:
        length = self.config.vision_config.image_size
        base = self.grid(length, length)
        flags = self.pack(torch.zeros(tiles, base.tokens, 1), size, torch.ones(1)).bool().flatten()
        structural: BoolArray = flags.numpy()
        grids = (base, *_rows(structural[base.tokens :]))
        return Layout(grids, structural, tiles, tuple(size.tolist()))

    def packer(self) -> Callable[..., Any]:
        """The stock class's `pack_image_features`, which reads nothing but a config, and a family has one."""
        if self.model is not None:
            return self.base().pack_image_features  # type: ignore[return-value]
        from transformers import LlavaNextModel

        return partial(LlavaNextModel.pack_image_features, self)

    def pack(self, features: Tensor, size: Tensor, newline: Tensor | None) -> Tensor:
        """Features (tiles, m, d) of one image in the order of the sequence, (columns, d)."""
        packed, _ = self.packer()(
            [_FIRST, features],
            size.expand(2, -1),
            self.config.vision_feature_select_strategy,
            image_newline=newline,
        )
        return packed[1]

    def to_tokens(self, patches: Tensor, image: Image) -> Tensor:
        return self.pack(patches, torch.tensor(image.size), None)

    def check_call(self, inputs: Mapping[str, Any]) -> None:
        check_features(self.config, self.vision_tower(), inputs)


def _rows(structural: BoolArray) -> list[Grid]:
    """The tiled view, from where its newlines are; nothing when there is only the base view's own newline."""
    ends = np.flatnonzero(structural)
    if not len(ends) or ends[0] == 0:
        return []
    return [Grid(1, len(ends), int(ends[0]))]
