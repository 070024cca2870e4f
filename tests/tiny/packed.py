"""PaddleOCR-VL and Kimi K2.5: Qwen's inputs, patches row by row; Kimi averages a video's frames."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from packaging import version
from transformers import (
    DeepseekV3Config,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
)

from .base import IMAGE, VIDEO, VISION_END, VISION_START, Draw, Piece, build_model, by_row, text_kwargs
from .qwen import QWEN_GRIDS, TOKENS, VIDEO_GRIDS, Qwen, mrope_text

PATCH = 4


def paddleocr_vl(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 2,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PaddleOCRVLForConditionalGeneration:
    text = mrope_text(layers, d, heads, kv_heads) | {"head_dim": d // heads}
    vision = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": vision_layers},
        **{"num_attention_heads": 2, "image_size": 32, "patch_size": PATCH, "spatial_merge_size": 2},
    }
    config = PaddleOCRVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **TOKENS)
    return build_model(PaddleOCRVLForConditionalGeneration, config, attn_implementation, dtype, seed)


def kimi_k25(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    vision_layers: int = 2,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Kimi_K25ForConditionalGeneration:
    """Latent attention: keys are wider than values; all layers but the first are mixtures."""
    text = DeepseekV3Config(
        **text_kwargs(layers, d, heads, heads),
        **{"q_lora_rank": 32, "kv_lora_rank": 32},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
        **{"moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    )
    vision = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": vision_layers},
        **{"num_attention_heads": 2, "pos_emb_height": 16, "pos_emb_width": 16, "pos_emb_time": 4},
        "patch_size": PATCH,
    }
    config = Kimi_K25Config(
        text_config=text,
        vision_config=vision,
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **TOKENS,
    )
    return build_model(Kimi_K25ForConditionalGeneration, config, attn_implementation, dtype, seed)


class Paddle(Qwen):
    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        height, width = map(int, detail.split("x")) if detail else QWEN_GRIDS[draw.number % len(QWEN_GRIDS)]
        grid, patches = _patches((1, height, width), draw)
        ids = [VISION_START, *[IMAGE] * (height * width), VISION_END]
        return Piece(ids, {"image_grid_thw": grid, "pixel_values": patches})

    def video(self, config: Any, detail: str, draw: Draw) -> Piece:
        raise ValueError(f"no videos in {config.model_type}")

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        def lengths(name: str) -> Iterator[int]:
            return (int(grid[1:].prod()) // 4 for grid in inputs.get(name, ()))

        sizes = {IMAGE: lengths("image_grid_thw"), VIDEO: lengths("video_grid_thw")}
        return by_row(inputs["input_ids"], sizes)


class Kimi(Paddle):
    def video(self, config: Any, detail: str, draw: Draw) -> Piece:
        if version.parse(transformers.__version__) < version.parse("5.24"):
            raise ValueError(
                "stock Kimi of this version splits a video's features by frames that it has averaged"
            )
        shape = tuple(map(int, detail.split("x"))) if detail else VIDEO_GRIDS[draw.number % len(VIDEO_GRIDS)]
        grid, patches = _patches(shape, draw)
        ids = [VISION_START, *[VIDEO] * math.prod(shape[1:]), VISION_END]
        return Piece(ids, {"video_grid_thw": grid, "pixel_values_videos": patches})

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        super().collate(config, rows, out)
        del out["mm_token_type_ids"]


def _patches(shape: tuple[int, ...], draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.tensor([[shape[0], 2 * shape[1], 2 * shape[2]]])
    return grid, draw.normal(4 * math.prod(shape), 3, PATCH, PATCH)
