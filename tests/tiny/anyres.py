"""LLaVA-NeXT and LLaVA-OneVision: a base view, then the crops of the image as one grid without its padding.

`"image:HxW"` is an image of H x W pixels; a crop is 12 pixels or `SIDE` visual tokens wide. Every row of the
grid ends in a newline, which is a placeholder but not prunable. OneVision shrinks a large grid, shows only
the base view and one newline where a row has several images, and ends a video with one newline. A plain
`"image"` takes the next of `IMAGE_SIZES` in turn: nothing unpadded; a column on
each side; a row on each side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution

from .base import (
    FRAMES,
    IMAGE,
    VIDEO,
    Draw,
    Family,
    Piece,
    build_model,
    columns,
    in_turn,
    text_config,
    vision_kwargs,
)
from .llava import clip

SIDE = 3  # visual tokens of a view
IMAGE_SIZES = ((24, 24), (24, 16), (16, 24))
PINPOINTS = ((12, 24), (24, 12), (24, 24))


def llava_next(
    text: str = "llama",
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 3,
    sliding_window: int | None = None,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlavaNextForConditionalGeneration:
    config = LlavaNextConfig(
        vision_config=clip(vision_layers, SIDE),
        text_config=text_config(text, layers, d, heads, kv_heads, sliding_window),
        image_token_index=IMAGE,
        image_seq_length=SIDE**2,
        image_grid_pinpoints=[list(size) for size in PINPOINTS],
    )
    return build_model(LlavaNextForConditionalGeneration, config, attn_implementation, dtype, seed)


def llava_onevision(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 3,
    limit: int = 3,
    sliding_window: int | None = None,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlavaOnevisionForConditionalGeneration:
    """A grid of more than about `limit` views' tokens is shrunk (released models: 9)."""
    vision = SiglipVisionConfig(**vision_kwargs(vision_layers, 4 * SIDE), vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text_config("qwen2", layers, d, heads, kv_heads, sliding_window),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[list(size) for size in PINPOINTS],
        vision_aspect_ratio=f"anyres_max_{limit}",
    )
    return build_model(LlavaOnevisionForConditionalGeneration, config, attn_implementation, dtype, seed)


class AnyRes(Family):
    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        height, width = map(int, detail.split("x")) if detail else IMAGE_SIZES[draw.number % len(IMAGE_SIZES)]
        best = select_best_resolution((height, width), config.image_grid_pinpoints)
        size = config.vision_config.image_size
        crops = 1 + (best[0] // size) * (best[1] // size) if self.cropped(draw.alone) else 1
        sizes = torch.tensor([[height, width]])
        ids = [IMAGE] * len(self.prunable(config, sizes[0], draw.alone))
        return Piece(ids, {"image_sizes": sizes, "pixel_values": draw.normal(1, crops, 3, size, size)})

    def cropped(self, alone: bool) -> bool:
        return True

    def prunable(self, config: Any, size: torch.Tensor, alone: bool) -> torch.Tensor:
        """Of the image's placeholders, which are visual tokens and which newlines."""
        base = torch.ones(SIDE**2, dtype=torch.bool)
        if not self.cropped(alone):
            return torch.cat([base, torch.tensor([False])])
        height, width = grid(config, *size.tolist())
        rows = torch.ones(height, width + 1, dtype=torch.bool)
        rows[:, -1] = False
        return torch.cat([base, rows.flatten()])

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        views = [
            piece.tensors["pixel_values"] for row in rows for piece in row if "image_sizes" in piece.tensors
        ]
        most = max((view.shape[1] for view in views), default=0)
        for piece in (piece for row in rows for piece in row if "image_sizes" in piece.tensors):
            pixels = piece.tensors["pixel_values"]
            filler = pixels.new_zeros(1, most - pixels.shape[1], *pixels.shape[2:])
            piece.tensors["pixel_values"] = torch.cat([pixels, filler], 1)
        super().collate(config, rows, out)

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        sizes = iter(inputs.get("image_sizes", ()))
        counts = inputs.get("batch_num_images", repeat(1))
        result = []
        for row, count in zip(inputs["input_ids"], counts, strict=False):
            found, images = columns(row, IMAGE), []
            while len(found):
                prunable = self.prunable(config, next(sizes), int(count) == 1)
                images.append(found[: len(prunable)][prunable])
                found = found[len(prunable) :]
            result.append(images)
        return result


class OneVision(AnyRes):
    def cropped(self, alone: bool) -> bool:
        return alone

    def video(self, config: Any, detail: str, draw: Draw) -> Piece:
        if detail:
            raise ValueError("videos of one length only: the processor makes one tensor of them")
        size = config.vision_config.image_size
        pixels = draw.normal(1, FRAMES, 3, size, size)
        return Piece([VIDEO] * (_video_tokens() + 1), {"pixel_values_videos": pixels})

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        super().collate(config, rows, out)
        if "image_sizes" in out:
            out["batch_num_images"] = torch.tensor(
                [sum("image_sizes" in piece.tensors for piece in row) for row in rows]
            )

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        lengths: Iterator[int] = repeat(_video_tokens() + 1)
        videos = [[v[:-1] for v in in_turn(row, VIDEO, lengths)] for row in inputs["input_ids"]]
        images = super().positions(config, inputs)
        return [sorted(a + b, key=lambda image: int(image[0])) for a, b in zip(images, videos, strict=True)]


def _video_tokens() -> int:
    return FRAMES * math.ceil(SIDE / 2) ** 2


def grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the crops' grid without padding, as in the processors' _get_unpadded_features."""
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, cols = (SIDE * (edge // config.vision_config.image_size) for edge in best)
    if width / height > cols / rows:
        rows -= (rows - int(round(height * (cols / width), 7))) // 2 * 2
    else:
        cols -= (cols - int(round(width * (rows / height), 7))) // 2 * 2
    limit = getattr(config, "vision_aspect_ratio", None)
    if limit is not None:
        ratio = math.sqrt(rows * cols / (int(limit.removeprefix("anyres_max_")) * SIDE**2))
        if ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
    return rows, cols
