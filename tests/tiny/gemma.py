"""Gemma3, PaliGemma (1 and 2) and Gemma4: blocks of visual tokens that attend to each other both ways, Gemma4's only
in the layers with windows and of any shape."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4Model,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from .base import (
    BOS,
    FRAMES,
    IMAGE,
    NEWLINE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Blocks,
    Draw,
    Family,
    Piece,
    build_model,
    by_row,
    text_kwargs,
    vision_kwargs,
)

SIDE = 4  # visual tokens
POOL, PATCH, MOST = (
    2,
    4,
    24,
)  # Gemma4: patches per side of a token, their pixels, tokens of the largest picture
AUDIO = 7


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


def gemma4(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 2,
    moe: bool = False,
    causal: bool = False,
    per_layer_input: int = 0,
    shared: int = 0,
    sliding_window: int | None = None,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Gemma4ForConditionalGeneration:
    """Every third layer attends fully, with wider heads whose keys are its values, too.

    causal: no blocks, as in the small models, which also have `per_layer_input` and `shared` keys.
    """
    text = text_kwargs(layers, d, heads, kv_heads) | {
        "head_dim": d // heads,
        "global_head_dim": 2 * d // heads,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 512 if sliding_window is None else sliding_window,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": per_layer_input,
        "vocab_size_per_layer_input": VOCAB,
        "use_bidirectional_attention": None if causal else "vision",
        "layer_types": [
            "full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(layers)
        ],
    }
    if moe:
        text |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    vision = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": vision_layers, "head_dim": 16},
        **{
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "patch_size": PATCH,
            "pooling_kernel_size": POOL,
        },
        **{"position_embedding_size": 64},
    }
    config = Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return build_model(Gemma4ForConditionalGeneration, config, attn_implementation, dtype, seed)


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


class Gemma4(Family):
    """`"image:HxW"` has H x W tokens, `"video:TxHxW"` T times as many, its frames behind their times."""

    GRIDS = ((4, 4), (2, 6), (3, 4))
    VIDEOS = ((FRAMES, 2, 4), (FRAMES + 1, 4, 2))

    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        shape = _shape(detail) if detail else self.GRIDS[draw.number % len(self.GRIDS)]
        pixels, places = _patches(*shape, draw)
        ids = [VISION_START, *[IMAGE] * (shape[0] * shape[1]), VISION_END]
        return Piece(ids, {"pixel_values": pixels, "image_position_ids": places})

    def video(self, config: Any, detail: str, draw: Draw) -> Piece:
        flat = "num_frames_per_video" in inspect.signature(Gemma4Model.forward).parameters
        videos = self.VIDEOS if flat else [(FRAMES, *shape) for _, *shape in self.VIDEOS]
        frames, *shape = _shape(detail) if detail else videos[draw.number % len(videos)]
        ids: list[int] = []
        for _ in range(frames):
            ids += [*draw.text(3), VISION_START, *[VIDEO] * (shape[0] * shape[1]), VISION_END]
        made = [_patches(*shape, draw) for _ in range(frames)]
        pixels, places = (torch.cat(parts) for parts in zip(*made, strict=True))
        if not flat:  # transformers before 5.24 stacks videos of as many frames
            return Piece(ids, {"pixel_values_videos": pixels[None], "video_position_ids": places[None]})
        tensors = {"pixel_values_videos": pixels, "video_position_ids": places}
        return Piece(ids, {**tensors, "num_frames_per_video": torch.tensor([frames])})

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        ids = out["input_ids"]
        out["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        super().collate(config, rows, out)

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        def counts(name: str) -> list[int]:
            return [int((places[..., 0] >= 0).sum()) // POOL**2 for places in inputs.get(name, ())]

        frames = iter(counts("video_position_ids"))
        videos = list(frames)
        if "num_frames_per_video" in inputs:
            frames = iter(videos)
            videos = [sum(next(frames) for _ in range(int(n))) for n in inputs["num_frames_per_video"]]
        sizes = {IMAGE: iter(counts("image_position_ids")), VIDEO: iter(videos)}
        return by_row(inputs["input_ids"], sizes)


def _shape(detail: str) -> tuple[int, ...]:
    return tuple(map(int, detail.split("x")))


def _patches(height: int, width: int, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a picture of so many tokens: (1, m, 3 * 16) pixels, and their places, padded."""
    rows, columns, most = height * POOL, width * POOL, MOST * POOL**2
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places, pixels = torch.full((1, most, 2), -1), torch.zeros(1, most, 3 * PATCH**2)
    places[0, : rows * columns] = torch.stack([x.flatten(), y.flatten()], dim=-1)
    pixels[0, : rows * columns] = torch.sigmoid(draw.normal(rows * columns, 3 * PATCH**2))
    return pixels, places
