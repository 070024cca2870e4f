"""LLaVA-OneVision: LLaVA-NeXT's views, shrunk beyond a limit; several images and videos without tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.models.base import Layout
from tokenprune.models.llava_next import _FIRST, LlavaNext
from tokenprune.tokens import Grid, Image, IntArray


class LlavaOnevision(LlavaNext):
    """An image alone in its prompt is tiled, several have the base view only; a newline ends each image and video."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    examples = ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf")

    def sizes(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Images: (N, 3) height, width and the number of images in the prompt. Videos: (N, 3) frames, height, width."""
        found = super().sizes(inputs)
        if "image" in found:
            counts = inputs.get("batch_num_images")
            size = found["image"]
            if counts is None:
                alone = torch.ones(len(size), 1)
            else:
                counts = torch.as_tensor(counts)
                alone = counts.repeat_interleave(counts, output_size=len(size))[:, None]
            found["image"] = torch.cat([size, alone.to(size)], dim=1)
        videos = inputs.get("pixel_values_videos")
        if videos is not None:
            count, frames, _, height, width = videos.shape
            found["video"] = torch.tensor([[frames, height, width]]).expand(count, -1)
        return found

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        if kind == "image":
            return [
                self.layout(torch.from_numpy(s[:2]), self.tiles(s[:2]) if s[2] == 1 else 1) for s in sizes
            ]
        made = []
        for frames, height, width in sizes.tolist():
            grid = self.grid(height, width)
            pooled = Grid(frames, math.ceil(grid.height / 2), math.ceil(grid.width / 2), 2)
            structural = np.zeros(pooled.tokens + 1, dtype=bool)
            structural[-1] = True
            made.append(Layout((pooled,), structural, frames))
        return made

    def pack(self, features: Tensor, size: Tensor, newline: Tensor | None) -> Tensor:
        packed, _ = self.base().pack_image_features(  # type: ignore[operator]
            [_FIRST, features],
            size.expand(2, -1),
            image_newline=newline,
            vision_aspect_ratio=self.config.vision_aspect_ratio,
        )
        return packed[1]

    def to_tokens(self, patches: Tensor, image: Image) -> Tensor:
        if image.kind == "image":
            return super().to_tokens(patches, image)
        return self.base().apply_pooling(patches).flatten(0, 1)  # type: ignore[operator]
