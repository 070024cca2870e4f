"""Mistral 3: a Pixtral tower, pictures of any size; a break token, which is text, stands behind each row of tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from .base import IMAGE, Draw, Family, Piece, build_model, in_turn, text_kwargs

GRIDS = ((4, 4), (4, 6), (6, 4), (5, 4))
BREAK, END, PIXELS = 7, 8, 8  # a token is 2 x 2 patches of 4 x 4 pixels
LARGEST = 6 * PIXELS


def mistral3(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 2,
    sliding_window: int | None = None,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Mistral3ForConditionalGeneration:
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
        head_dim=16,
    )
    text = MistralConfig(
        **text_kwargs(layers, d, heads, kv_heads), sliding_window=sliding_window, head_dim=d // heads
    )
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2
    )
    return build_model(Mistral3ForConditionalGeneration, config, attn_implementation, dtype, seed)


class Mistral(Family):
    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        height, width = map(int, detail.split("x")) if detail else GRIDS[draw.number % len(GRIDS)]
        ids = [token for _ in range(height) for token in [*[IMAGE] * width, BREAK]]
        pixels = torch.zeros(1, 3, LARGEST, LARGEST)
        pixels[:, :, : height * PIXELS, : width * PIXELS] = draw.normal(1, 3, height * PIXELS, width * PIXELS)
        sizes = torch.tensor([[height * PIXELS, width * PIXELS]])
        return Piece([*ids[:-1], END], {"pixel_values": pixels, "image_sizes": sizes})

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        lengths = iter([int(h) * int(w) // PIXELS**2 for h, w in inputs.get("image_sizes", ())])
        return [in_turn(row, IMAGE, lengths) for row in inputs["input_ids"]]
