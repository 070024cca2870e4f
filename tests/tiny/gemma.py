"""Gemma3 and PaliGemma (1 and 2): fixed blocks of visual tokens that attend to each other both ways."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from .base import (
    BOS,
    IMAGE,
    NEWLINE,
    VISION_END,
    VISION_START,
    Blocks,
    Draw,
    Piece,
    build_model,
    text_kwargs,
    vision_kwargs,
)

SIDE = 4  # visual tokens


def gemma3(
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
) -> Gemma3ForConditionalGeneration:
    """Every third layer attends fully, the others within a window (released models: every sixth)."""
    text = text_kwargs(layers, d, heads, kv_heads) | {
        "head_dim": d // heads,
        "query_pre_attn_scalar": d // heads,
        "sliding_window": 512 if sliding_window is None else sliding_window,
        "layer_types": [
            "full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(layers)
        ],
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=_siglip(vision_layers, 2 * SIDE),  # pooled by two
        mm_tokens_per_image=SIDE**2,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )
    return build_model(Gemma3ForConditionalGeneration, config, attn_implementation, dtype, seed)


def paligemma(
    text: str = "gemma",
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
) -> PaliGemmaForConditionalGeneration:
    """text "gemma2" makes a PaliGemma 2: every second layer attends within a window, and only eager works."""
    kwargs = text_kwargs(layers, d, heads, kv_heads) | {"head_dim": d // heads}
    if text == "gemma2":
        kwargs["query_pre_attn_scalar"] = d // heads
        kwargs["sliding_window"] = 512 if sliding_window is None else sliding_window
    elif sliding_window is not None:
        raise ValueError(f"no sliding window in a {text} text model")
    config = PaliGemmaConfig(
        text_config={"gemma": GemmaConfig, "gemma2": Gemma2Config}[text](**kwargs),
        vision_config=_siglip(vision_layers, SIDE),
        image_token_index=IMAGE,
        projection_dim=d,
        hidden_size=d,
        tie_word_embeddings=False,
    )
    return build_model(PaliGemmaForConditionalGeneration, config, attn_implementation, dtype, seed)


def _siglip(layers: int, patches: int) -> Any:
    return SiglipVisionConfig(**vision_kwargs(layers, 4 * patches), vision_use_head=False)


class Gemma3(Blocks):
    """Image start and end, and empty lines, stand around an image; the token types name its block."""

    def tokens(self, config: Any) -> int:
        return config.mm_tokens_per_image

    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        block = super().image(config, detail, draw)
        return Piece([NEWLINE, VISION_START, *block.ids, VISION_END, NEWLINE], block.tensors)

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        out["token_type_ids"] = (out["input_ids"] == IMAGE).long()
        super().collate(config, rows, out)


class PaliGemma(Blocks):
    """The start token follows the last image; the whole prompt is of type 0, the prefix seen both ways."""

    def tokens(self, config: Any) -> int:
        return config.text_config.num_image_tokens

    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        block = super().image(config, detail, draw)
        return Piece(block.ids + ([BOS] if draw.last else []), block.tensors)

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        out["token_type_ids"] = torch.zeros_like(out["input_ids"])
        super().collate(config, rows, out)
