"""GLM-4.1V, 4.5V and 4.6V: Qwen's images; videos' frames have images' placeholders, and a call brings one kind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)

from .base import IMAGE, VIDEO, VISION_END, VISION_START, Draw, Piece, build_model, in_turn
from .qwen import TIMESTAMP, Qwen, mrope_text

VIDEO_START, VIDEO_END = 7, 8
_KINDS = {
    "glm4v": (Glm4vConfig, Glm4vForConditionalGeneration),
    "glm46v": (Glm46VConfig, Glm46VForConditionalGeneration),
    "glm4v_moe": (Glm4vMoeConfig, Glm4vMoeForConditionalGeneration),
}


def glm(
    kind: str = "glm4v",
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 2,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """Of the mixture (GLM-4.5V) only the first layer is dense, and half of each head has no rotary embedding."""
    text = mrope_text(layers, d, heads, kv_heads)
    text["rope_parameters"]["partial_rotary_factor"] = 1.0
    if kind == "glm4v_moe":
        quarter = d // heads // 4
        text["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [quarter - 2, 1, 1]}
        text |= {
            **{
                "head_dim": d // heads,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
            },
            **{"moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        }
    vision = {
        **{
            "depth": vision_layers,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
        },
        **{"temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": d, "image_size": 64},
    }
    if kind == "glm46v":
        text, vision = {"model_type": "glm4v_text", **text}, {"model_type": "glm4v_vision", **vision}
    config_class, model_class = _KINDS[kind]
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
        tie_word_embeddings=False,
    )
    return build_model(model_class, config, attn_implementation, dtype, seed)


class Glm(Qwen):
    def frames(self, shape: tuple[int, ...], draw: Draw) -> list[int]:
        frame = [VISION_START, *[IMAGE] * (shape[1] * shape[2]), VISION_END]
        frames = [token for _ in range(shape[0]) for token in [*frame, *draw.text(TIMESTAMP)]]
        return [VIDEO_START, *frames, VIDEO_END]

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        super().collate(config, rows, out)
        if "video_grid_thw" in out:
            if "image_grid_thw" in out:
                raise ValueError(f"stock {config.model_type} takes images or videos in a call, not both")
            out["mm_token_type_ids"] *= 2

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        merge = config.vision_config.spatial_merge_size**2
        grids = inputs.get("image_grid_thw", inputs.get("video_grid_thw", ()))
        lengths = iter([int(grid.prod()) // merge for grid in grids])
        return [in_turn(row, IMAGE, lengths) for row in inputs["input_ids"]]
