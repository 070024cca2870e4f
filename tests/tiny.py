"""Tiny random multimodal models and inputs for the tests: built from configs, seeded, nothing downloaded.

A model is a stock `transformers` model, fp32 (unless asked otherwise) and in eval mode. Its weights are drawn
here, not by the library, so that they do not depend on the library's version, and so that attention is
peaked: dropping a few visual tokens then moves the logits by far more than any tolerance used in the tests.

Rows of a batch are lists of pieces, such as `["text:5", "image", "text:3", "image", "text:4"]`:

* `"text:N"`: N random text tokens (never a special token).
* `"image"`: one image. LLaVA: n image tokens, nothing around them, so neighbours touch. Qwen2.5-VL: vision
  start, image tokens, vision end, as in its chat template (its position code needs something in between).
* `"image:HxW"`: Qwen2.5-VL only, an image of H x W visual tokens in the language model. A plain `"image"`
  takes the next of `QWEN_GRIDS` in turn, so images of one batch differ in size.

Special tokens are suppressed in `generation_config`: every generated id is a text id (a generated image token
would be a placeholder without an image), and greedy search always makes `max_new_tokens` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

VOCAB = 128
PAD, BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO = range(7)
FIRST_TEXT_ID = 10
QWEN_GRIDS = ((4, 4), (4, 6), (6, 4), (5, 4))

_TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


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
    text_kwargs: dict[str, Any] = {}
    if text == "mistral":
        text_kwargs["sliding_window"] = sliding_window  # its config's default is 4096, not None
    elif text == "qwen2" and sliding_window is not None:
        text_kwargs |= {
            "use_sliding_window": True,
            "sliding_window": sliding_window,
            "max_window_layers": layers // 2,
        }
    elif sliding_window is not None:
        raise ValueError(f"no sliding window in a {text} text model")
    text_config = _TEXT_CONFIGS[text](**_text_kwargs(layers, d, heads, kv_heads), **text_kwargs)
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=4 * side,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE,
        image_seq_length=side * side + (strategy == "full"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
        pad_token_id=PAD,
    )
    return _build(LlavaForConditionalGeneration, config, attn_implementation, dtype, seed)


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
    half = d // heads // 2
    if half < 3:
        raise ValueError(f"head size {2 * half} is too small for three rotary sections")
    text_config: dict[str, Any] = _text_kwargs(layers, d, heads, kv_heads)
    text_config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        # time, height, width; 2:3:3 as in the released models
        "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
    }
    if sliding_window is not None:
        text_config |= {
            "use_sliding_window": True,
            "sliding_window": sliding_window,
            "max_window_layers": layers // 2,
        }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config={
            "depth": vision_layers,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 16,
            "out_hidden_size": d,
            "fullatt_block_indexes": [vision_layers - 1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, attn_implementation, dtype, seed)


def inputs(
    model: PreTrainedModel, rows: Sequence[Sequence[str]], pad: str = "left", seed: int = 0
) -> dict[str, torch.Tensor]:
    """What a processor would return for these rows: ids, mask, pixels, and the family's extras.

    Pixels (and grids) are absent when no row has an image. The same pieces and seed give the same ids and
    pixels whatever the padding side.
    """
    if pad not in ("left", "right"):
        raise ValueError(f"pad is {pad!r}, not 'left' or 'right'")
    qwen = _is_qwen(model)
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = []
    pixels: list[torch.Tensor] = []
    grids: list[tuple[int, int, int]] = []
    for row in rows:
        row_ids: list[int] = []
        for piece in row:
            kind, _, detail = piece.partition(":")
            if kind == "text":
                row_ids += torch.randint(FIRST_TEXT_ID, VOCAB, (int(detail),), generator=generator).tolist()
            elif kind == "image" and qwen:
                height, width = (
                    map(int, detail.split("x")) if detail else QWEN_GRIDS[len(grids) % len(QWEN_GRIDS)]
                )
                row_ids += [VISION_START, *[IMAGE] * (height * width), VISION_END]
                vision = model.config.vision_config
                merge = vision.spatial_merge_size
                grids.append((1, height * merge, width * merge))
                patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
                pixels.append(torch.randn(height * width * merge**2, patch, generator=generator))
            elif kind == "image" and not detail:
                row_ids += [IMAGE] * model.config.image_seq_length
                size = model.config.vision_config.image_size
                pixels.append(torch.randn(1, 3, size, size, generator=generator))
            else:
                raise ValueError(f"unknown piece {piece!r}")
        ids.append(row_ids)
    longest = max(map(len, ids))

    def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
        fill = [[filler] * (longest - len(x)) for x in lists]
        return torch.tensor([f + x if pad == "left" else x + f for f, x in zip(fill, lists, strict=True)])

    out = {"input_ids": padded(ids, PAD), "attention_mask": padded([[1] * len(x) for x in ids], 0)}
    if qwen:
        out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).int()
    if pixels:
        out["pixel_values"] = torch.cat(pixels).to(model.dtype)
        if qwen:
            out["image_grid_thw"] = torch.tensor(grids)
    return out


def visual_positions(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """`[row][image]` -> the columns of `input_ids` where that image's visual tokens stand, in raster
    order."""
    grids = inputs.get("image_grid_thw")
    merge = model.config.vision_config.spatial_merge_size**2 if grids is not None else 1
    sizes = iter([int(grid.prod()) // merge for grid in grids] if grids is not None else [])
    result: list[list[torch.Tensor]] = []
    for row in inputs["input_ids"]:
        columns = (row == model.config.image_token_id).nonzero().flatten()
        images: list[torch.Tensor] = []
        while len(columns):
            n = next(sizes) if grids is not None else model.config.image_seq_length
            images.append(columns[:n])
            columns = columns[n:]
        result.append(images)
    return result


def random_cuts(
    positions: list[list[torch.Tensor]], layers: Sequence[int], keep: Sequence[float], seed: int = 0
) -> list[tuple[int, list[list[torch.Tensor]]]]:
    """Nested random keep lists: at `layers[i]` about `keep[i]` of each image's tokens (at least one) stay.

    Counts differ between images by one now and then, so that rows of a batch are ragged.
    """
    generator = torch.Generator().manual_seed(seed)
    current = [[torch.arange(len(image)) for image in row] for row in positions]
    cuts = []
    for layer, fraction in zip(layers, keep, strict=True):
        for row, images in enumerate(current):
            for image, kept in enumerate(images):
                extra = int(torch.randint(0, 2, (), generator=generator))
                count = max(1, int(fraction * len(positions[row][image])) + extra)
                order = torch.randperm(len(kept), generator=generator)[:count]
                current[row][image] = kept[order].sort().values
        cuts.append((layer, [list(images) for images in current]))
    return cuts


def random_merges(
    positions: list[list[torch.Tensor]], cuts: list[tuple[int, list[list[torch.Tensor]]]], seed: int = 0
) -> list[list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """For every cut, each dropped token goes to a random kept one; the slot weighs itself and its sources."""
    generator = torch.Generator().manual_seed(seed)
    before = [[torch.arange(len(image)) for image in row] for row in positions]
    merges = []
    for _, keep in cuts:
        rows = zip(before, keep, strict=True)
        merges.append([[_merge(a, b, generator) for a, b in zip(*row, strict=True)] for row in rows])
        before = keep
    return merges


def _merge(
    before: torch.Tensor, kept: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    dropped = before[~torch.isin(before, kept)]
    slots = kept[torch.randint(len(kept), (len(dropped),), generator=generator)]
    used = slots.unique()
    pairs = torch.cat([torch.stack([used, used], 1), torch.stack([dropped, slots], 1)])
    weights = torch.rand(len(pairs), generator=generator) + 0.1
    totals = torch.zeros(int(before.max()) + 1).index_add_(0, pairs[:, 1], weights)
    return pairs, weights / totals[pairs[:, 1]]


def _is_qwen(model: PreTrainedModel) -> bool:
    return model.config.model_type == "qwen2_5_vl"


def _text_kwargs(layers: int, d: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": d,
        "intermediate_size": 2 * d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }


def _build(cls: type, config: Any, attn_implementation: str, dtype: torch.dtype, seed: int) -> Any:
    # The config is made anew in every call: building a model writes the attention implementation into it.
    with torch.random.fork_rng(devices=[]):  # construction draws from the global generator
        # A dtype given here leaves the rotary frequencies in fp32, as from_pretrained does; `.to` would not.
        model = cls._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = list(range(FIRST_TEXT_ID))
    return model.eval()


def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms (not exactly one: a forgotten norm must show) and biases
                parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))
            elif "embed_tokens" in name or "position_embedding" in name:
                parameter.copy_(noise)
            else:
                # queries and keys larger: attention logits of about +-2, neither flat nor one-hot
                gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
                parameter.copy_(gain / math.sqrt(parameter[0].numel()) * noise)
