"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, M-RoPE.

Vision start and end stand around the placeholders as in the chat templates; the position code needs something
between two images. `"image:HxW"` has H x W visual tokens, `"video:TxHxW"` T times as many. Qwen3-VL's videos
have a text of their own before every frame, with the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from .base import (
    FRAMES,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    Draw,
    Family,
    Piece,
    build_model,
    by_row,
    text_kwargs,
    windows,
)

QWEN_GRIDS = ((4, 4), (4, 6), (6, 4), (5, 4))
VIDEO_GRIDS = ((FRAMES, 2, 4), (FRAMES + 1, 4, 2))
TIMESTAMP = 3  # text tokens before every frame of Qwen3-VL


def qwen2_vl(
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
) -> Qwen2VLForConditionalGeneration:
    vision = _vision(vision_layers, mlp_ratio=2, embed_dim=32) | {"hidden_size": d}
    del vision["intermediate_size"]
    config = Qwen2VLConfig(
        text_config=mrope_text(layers, d, heads, kv_heads, sliding_window), vision_config=vision, **TOKENS
    )
    return build_model(Qwen2VLForConditionalGeneration, config, attn_implementation, dtype, seed)


def qwen2_5_vl(
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
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with M-RoPE; its last vision layer attends fully, the others within windows."""
    vision = _vision(
        vision_layers, window_size=16, out_hidden_size=d, fullatt_block_indexes=[vision_layers - 1]
    )
    config = Qwen2_5_VLConfig(
        text_config=mrope_text(layers, d, heads, kv_heads, sliding_window), vision_config=vision, **TOKENS
    )
    return build_model(Qwen2_5_VLForConditionalGeneration, config, attn_implementation, dtype, seed)


def qwen3_vl(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 3,
    deepstack: int = 2,
    moe: bool = False,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration:
    """Its first `deepstack` decoder layers add features of the vision layers to the visual tokens."""
    text = mrope_text(layers, d, heads, kv_heads, None)
    text["rope_parameters"] |= {"mrope_interleaved": True}
    text["head_dim"] = d // heads
    vision = _vision(
        vision_layers,
        out_hidden_size=d,
        num_position_embeddings=64,
        deepstack_visual_indexes=list(range(deepstack)),
    )
    if moe:
        text |= {**_EXPERTS, "decoder_sparse_step": 1}
        config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **TOKENS)
        return build_model(Qwen3VLMoeForConditionalGeneration, config, attn_implementation, dtype, seed)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return build_model(Qwen3VLForConditionalGeneration, config, attn_implementation, dtype, seed)


def qwen3_5(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 2,
    moe: bool = False,
    every: int = 2,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Qwen3_5ForConditionalGeneration | Qwen3_5MoeForConditionalGeneration:
    """Every so many layers attend, the others are Gated DeltaNet (released models: every fourth)."""
    text = mrope_text(layers, d, heads, kv_heads, None)
    text["rope_parameters"] |= {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
    text |= {
        "head_dim": d // heads,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "layer_types": [
            "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)
        ],
    }
    vision = _vision(vision_layers, out_hidden_size=d, num_position_embeddings=64)
    if moe:
        text |= {**_EXPERTS, "shared_expert_intermediate_size": 32}
        config = Qwen3_5MoeConfig(text_config=text, vision_config=vision, **TOKENS)
        return build_model(Qwen3_5MoeForConditionalGeneration, config, attn_implementation, dtype, seed)
    config = Qwen3_5Config(text_config=text, vision_config=vision, **TOKENS)
    return build_model(Qwen3_5ForConditionalGeneration, config, attn_implementation, dtype, seed)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _vision(layers: int, **more: Any) -> dict[str, Any]:
    return {
        "depth": layers,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        **more,
    }


def mrope_text(
    layers: int, d: int, heads: int, kv_heads: int, sliding_window: int | None = None
) -> dict[str, Any]:
    """Of a decoder whose positions have three axes."""
    half = d // heads // 2
    if half < 3:
        raise ValueError(f"head size {2 * half} is too small for three rotary sections")
    config: dict[str, Any] = text_kwargs(layers, d, heads, kv_heads)
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        # time, height, width; 2:3:3 as in the released models
        "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
    }
    return config | (windows(layers, sliding_window) if sliding_window is not None else {})


class Qwen(Family):
    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        height, width = _sizes(detail) if detail else QWEN_GRIDS[draw.number % len(QWEN_GRIDS)]
        grid, patches = _patches(config, (1, height, width), draw)
        ids = [VISION_START, *[IMAGE] * (height * width), VISION_END]
        return Piece(ids, {"image_grid_thw": grid, "pixel_values": patches})

    def video(self, config: Any, detail: str, draw: Draw) -> Piece:
        shape = _sizes(detail) if detail else VIDEO_GRIDS[draw.number % len(VIDEO_GRIDS)]
        grid, patches = _patches(config, shape, draw)
        tensors = {"video_grid_thw": grid, "pixel_values_videos": patches}
        if config.model_type == "qwen2_5_vl":
            tensors["second_per_grid_ts"] = torch.tensor([1.0 + draw.number])
        return Piece(self.frames(shape, draw), tensors)

    def frames(self, shape: tuple[int, ...], draw: Draw) -> list[int]:
        return [VISION_START, *[VIDEO] * math.prod(shape), VISION_END]

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        ids = out["input_ids"]
        out["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        super().collate(config, rows, out)

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        merge = config.vision_config.spatial_merge_size**2

        def lengths(name: str) -> Iterator[int]:
            return (int(grid.prod()) // merge for grid in inputs.get(name, ()))

        sizes = {IMAGE: lengths("image_grid_thw"), VIDEO: lengths("video_grid_thw")}
        return by_row(inputs["input_ids"], sizes)


class Qwen3(Qwen):
    def frames(self, shape: tuple[int, ...], draw: Draw) -> list[int]:
        frame = [VISION_START, *[VIDEO] * (shape[1] * shape[2]), VISION_END]
        return [token for _ in range(shape[0]) for token in [*draw.text(TIMESTAMP), *frame]]


def _sizes(detail: str) -> tuple[int, ...]:
    return tuple(map(int, detail.split("x")))


def _patches(config: Any, shape: tuple[int, ...], draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Grid and patches of an image of `shape` visual tokens (time, height, width)."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[shape[0], shape[1] * merge, shape[2] * merge]])
    return grid, draw.normal(math.prod(shape) * merge**2, patch)
