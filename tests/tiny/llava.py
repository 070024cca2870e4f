"""LLaVA and VipLLaVA: a fixed number of placeholders per image, nothing around them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from .base import IMAGE, PAD, Blocks, build_model, text_config, vision_kwargs


def llava(
    text: str = "llama",
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    side: int = 5,
    strategy: str = "default",
    vision_layers: int = 3,
    sliding_window: int | None = None,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A LLaVA with `side` * `side` visual tokens per image (one more, the CLS token, with strategy
    "full")."""
    config = LlavaConfig(
        vision_config=clip(vision_layers, side),
        text_config=text_config(text, layers, d, heads, kv_heads, sliding_window),
        image_token_index=IMAGE,
        image_seq_length=side * side + (strategy == "full"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
        pad_token_id=PAD,
    )
    return build_model(LlavaForConditionalGeneration, config, attn_implementation, dtype, seed)


def vipllava(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    side: int = 5,
    vision_layers: int = 3,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> VipLlavaForConditionalGeneration:
    """It concatenates several vision layers; the CLS token is always left out."""
    config = VipLlavaConfig(
        vision_config=clip(vision_layers, side),
        text_config=text_config("llama", layers, d, heads, kv_heads),
        image_token_index=IMAGE,
        image_seq_length=side * side,
        vision_feature_layers=[-2, 1],
        pad_token_id=PAD,
    )
    return build_model(VipLlavaForConditionalGeneration, config, attn_implementation, dtype, seed)


def clip(layers: int, side: int) -> Any:
    return CLIPVisionConfig(**vision_kwargs(layers, 4 * side), projection_dim=32)


class Llava(Blocks):
    pass
