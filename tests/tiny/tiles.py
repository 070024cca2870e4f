"""InternVL, Idefics3, SmolVLM and Llama4: an image is cut into tiles of equal size; a small view follows.

`"image:RxC"` is cut into R x C tiles plus the small view, `"image:1x1"` is the small view alone. A plain
`"image"` takes the next of `TILES` in turn. What counts as one image differs:

* InternVL: all tiles, they touch. A video's frames are images with text between them.
* Idefics3, SmolVLM: every tile on its own, as a token stands before each. Frames likewise (SmolVLM).
* Llama4: all between image start and image end, tile separators left out.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from .base import (
    FRAMES,
    IMAGE,
    NEWLINE,
    PAD,
    VISION_END,
    VISION_START,
    VOCAB,
    Draw,
    Family,
    Piece,
    build_model,
    columns,
    runs,
    text_config,
    text_kwargs,
    vision_kwargs,
)

TILES = ((1, 1), (1, 2), (2, 1))
PIXELS = 24  # a tile's side: 6 x 6 patches, shuffled to 3 x 3 visual tokens
TOKENS = 9
FAKE, GLOBAL = 7, 8  # Idefics3
IMAGE_MARK, TILE_X, TILE_Y = 7, 8, 9  # Llama4


def internvl(
    text: str = "qwen2",
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
) -> InternVLForConditionalGeneration:
    vision = vision_kwargs(vision_layers, PIXELS) | {"image_size": [PIXELS] * 2, "patch_size": [4, 4]}
    config = InternVLConfig(
        vision_config=vision,
        text_config=text_config(text, layers, d, heads, kv_heads, sliding_window),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return build_model(InternVLForConditionalGeneration, config, attn_implementation, dtype, seed)


def idefics3(**kwargs: Any) -> Idefics3ForConditionalGeneration:
    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration, **kwargs)


def smolvlm(**kwargs: Any) -> SmolVLMForConditionalGeneration:
    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, **kwargs)


def _idefics(
    config_class: Any,
    model_class: Any,
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
    config = config_class(
        vision_config=vision_kwargs(vision_layers, PIXELS),
        text_config=text_config("llama", layers, d, heads, kv_heads),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return build_model(model_class, config, attn_implementation, dtype, seed)


def llama4(
    *,
    layers: int = 6,
    d: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 2,
    floor_scale: int = 8192,
    sliding_window: int | None = None,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Llama4ForConditionalGeneration:
    """Every fourth layer has no rotary positions and attends fully, the others within chunks (of
    `sliding_window` tokens); every second layer is a mixture of two experts.

    floor_scale: after every so many columns, counted in the layer, the full layers' queries grow.
    """
    text = text_kwargs(layers, d, heads, kv_heads) | {
        "intermediate_size": d,
        "intermediate_size_mlp": 2 * d,
        "head_dim": d // heads,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "floor_scale": floor_scale,
        "attention_chunk_size": 8192 if sliding_window is None else sliding_window,
    }
    vision = vision_kwargs(vision_layers, PIXELS) | {
        "intermediate_size": 128,  # of the tiles' tokens after the shuffle: four patches
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    config = Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    return build_model(Llama4ForConditionalGeneration, config, attn_implementation, dtype, seed)


class InternVL(Family):
    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        return self.run(_count(*_tiles(detail, draw)), draw)

    def run(self, tiles: int, draw: Draw) -> Piece:
        ids = [VISION_START, *[IMAGE] * (TOKENS * tiles), VISION_END]
        return Piece(ids, {"pixel_values": _pixels(tiles, draw)})

    def video(self, config: Any, detail: str, draw: Draw) -> Piece:
        ids: list[int] = []
        for frame in range(FRAMES):
            ids += [NEWLINE] * (frame > 0) + draw.text(2) + self.run(1, draw).ids
        return Piece(ids, {"pixel_values": _pixels(FRAMES, draw)})

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        return [runs(row, IMAGE) for row in inputs["input_ids"]]


class Llama4(Family):
    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        rows, cols = _tiles(detail, draw)
        tile = [IMAGE] * TOKENS
        ids = [VISION_START]
        if rows * cols > 1:
            for _ in range(rows):
                ids += tile
                ids += [TILE_X, *tile] * (cols - 1) + [TILE_Y]
        ids += [IMAGE_MARK, *tile, VISION_END]
        return Piece(ids, {"pixel_values": _pixels(_count(rows, cols), draw)})

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        result = []
        for row in inputs["input_ids"]:
            found = columns(row, IMAGE)
            starts, ends = columns(row, VISION_START), columns(row, VISION_END)
            result.append([found[(found > a) & (found < b)] for a, b in zip(starts, ends, strict=True)])
        return result


class Idefics(Family):
    """Pixels and their mask are (rows of the batch, most tiles of a row, ...), filled up with zeros."""

    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        rows, cols = _tiles(detail, draw)
        tile = [IMAGE] * TOKENS
        ids: list[int] = []
        if rows * cols > 1:
            for i in range(rows):
                for j in range(cols):
                    ids += [
                        FAKE,
                        VOCAB - 1 - (cols * i + j),
                        *tile,
                    ]  # an ordinary id that names row and column
                ids += [NEWLINE]
            ids += [NEWLINE]
        pixels = _pixels(_count(rows, cols), draw)
        seen = torch.ones(len(pixels), PIXELS, PIXELS, dtype=torch.long)
        if rows * cols == 1:  # an image that is not cut keeps its shape and is padded
            seen[:, :, PIXELS - 8 :] = 0
        ids += [FAKE, GLOBAL, *tile, FAKE]
        return Piece(ids, {"pixel_values": pixels * seen[:, None], "pixel_attention_mask": seen})

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        for name in ("pixel_values", "pixel_attention_mask"):
            found = [[p.tensors[name] for p in row if name in p.tensors] for row in rows]
            tiles = [torch.cat(parts) if parts else None for parts in found]
            like = next((t for t in tiles if t is not None), None)
            if like is not None:
                most = max(len(t) for t in tiles if t is not None)
                out[name] = like.new_zeros(len(rows), most, *like.shape[1:])
                for row, t in enumerate(tiles):
                    if t is not None:
                        out[name][row, : len(t)] = t

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        return [runs(row, IMAGE) for row in inputs["input_ids"]]


class SmolVLM(Idefics):
    def video(self, config: Any, detail: str, draw: Draw) -> Piece:
        """An introduction, then every frame after its time."""
        ids = draw.text(4)
        frames = []
        for _ in range(FRAMES):
            frames.append(self.image(config, "1x1", draw))
            ids += [NEWLINE, *draw.text(3), *frames[-1].ids]
        tensors = {name: torch.cat([f.tensors[name] for f in frames]) for name in frames[0].tensors}
        return Piece([*ids, NEWLINE, NEWLINE], tensors)


def _tiles(detail: str, draw: Draw) -> tuple[int, int]:
    rows, cols = map(int, detail.split("x")) if detail else TILES[draw.number % len(TILES)]
    return rows, cols


def _count(rows: int, cols: int) -> int:
    return rows * cols + (rows * cols > 1)


def _pixels(tiles: int, draw: Draw) -> torch.Tensor:
    return draw.normal(tiles, 3, PIXELS, PIXELS)
