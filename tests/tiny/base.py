"""What the families share: ids, text configs, weights, and how the pieces of a batch become tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 128
PAD, BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO = range(7)
FIRST_TEXT_ID = 10
NEWLINE = FIRST_TEXT_ID  # the text between crops and frames; an ordinary id
FRAMES = 2  # of a video

BROKEN: dict[str, str] = {}
"""Families whose stock forward fails in the release installed, and why."""
if transformers.__version__ == "5.24.0":
    BROKEN["llama4"] = "stock Llama 4 of 5.24.0 reads an output that its text model does not have"

_TEXT_CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "gpt_oss": GptOssConfig,
}
_EMBEDDINGS = ("embed_tokens", "position_embedding", "positional_embedding", "pos_embed")


@dataclass
class Draw:
    """Random numbers in the order of the pieces, so that they do not depend on padding."""

    generator: torch.Generator
    number: int = 0
    """How many images and videos the batch had before this one."""
    alone: bool = True
    """Whether the row has no other image (LLaVA-OneVision crops only these)."""
    last: bool = False
    """Whether no image follows in the row."""

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def text(self, count: int) -> list[int]:
        return torch.randint(FIRST_TEXT_ID, VOCAB, (count,), generator=self.generator).tolist()


@dataclass
class Piece:
    """Ids of the language model, and the family's tensors: one entry of a list over the whole batch."""

    ids: list[int]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Family:
    """How a family's processor lays out images, and where its prunable tokens stand."""

    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        raise NotImplementedError

    def video(self, config: Any, detail: str, draw: Draw) -> Piece:
        raise ValueError(f"no videos in {config.model_type}")

    def collate(self, config: Any, rows: list[list[Piece]], out: dict[str, torch.Tensor]) -> None:
        """Adds the family's tensors to ids and mask. Absent where no row has an image."""
        tensors: dict[str, list[torch.Tensor]] = {}
        for piece in (piece for row in rows for piece in row):
            for name, tensor in piece.tensors.items():
                tensors.setdefault(name, []).append(tensor)
        out.update({name: torch.cat(parts) for name, parts in tensors.items()})

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        raise NotImplementedError


class Blocks(Family):
    """Every image is `tokens` placeholders; blocks of one row may touch."""

    def tokens(self, config: Any) -> int:
        return config.image_seq_length

    def side(self, config: Any) -> int:
        return config.vision_config.image_size

    def image(self, config: Any, detail: str, draw: Draw) -> Piece:
        if detail:
            raise ValueError(f"images of one size only, not {detail!r}")
        pixels = draw.normal(1, 3, self.side(config), self.side(config))
        return Piece([IMAGE] * self.tokens(config), {"pixel_values": pixels})

    def positions(self, config: Any, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        return [
            in_turn(row, config.image_token_id, repeat(self.tokens(config))) for row in inputs["input_ids"]
        ]


def columns(row: torch.Tensor, token: int) -> torch.Tensor:
    return (row == token).nonzero().flatten()


def runs(row: torch.Tensor, token: int) -> list[torch.Tensor]:
    """The columns of each contiguous stretch of `token`."""
    found = columns(row, token)
    breaks = (found.diff() > 1).nonzero().flatten() + 1
    return [run for run in found.tensor_split(breaks.tolist()) if len(run)]


def in_turn(row: torch.Tensor, token: int, lengths: Iterator[int]) -> list[torch.Tensor]:
    """The row's placeholders, cut to the lengths of the batch's images in order."""
    found, images = columns(row, token), []
    while len(found):
        n = next(lengths)
        images.append(found[:n])
        found = found[n:]
    return images


def by_row(ids: torch.Tensor, lengths: dict[int, Iterator[int]]) -> list[list[torch.Tensor]]:
    """Per row, the images of all kinds, from left to right; what stands within a video does not part it."""
    rows = [[one for token, own in lengths.items() for one in in_turn(row, token, own)] for row in ids]
    return [sorted(images, key=lambda image: int(image[0])) for images in rows]


def make_inputs(
    family: Family, model: PreTrainedModel, rows: Sequence[Sequence[str]], pad: str, seed: int
) -> dict[str, torch.Tensor]:
    if pad not in ("left", "right"):
        raise ValueError(f"pad is {pad!r}, not 'left' or 'right'")
    draw = Draw(torch.Generator().manual_seed(seed))
    made: list[list[Piece]] = []
    for row in rows:
        made.append([])
        images = [i for i, piece in enumerate(row) if piece.startswith("image")]
        draw.alone = len(images) == 1
        for i, piece in enumerate(row):
            draw.last = images[-1:] == [i]
            kind, _, detail = piece.partition(":")
            if kind == "text":
                made[-1].append(Piece(draw.text(int(detail))))
            elif kind in ("image", "video"):
                made[-1].append(getattr(family, kind)(model.config, detail, draw))
                draw.number += 1
            else:
                raise ValueError(f"unknown piece {piece!r}")
    ids = [[token for piece in row for token in piece.ids] for row in made]
    longest = max(map(len, ids))

    def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
        fill = [[filler] * (longest - len(x)) for x in lists]
        return torch.tensor([f + x if pad == "left" else x + f for f, x in zip(fill, lists, strict=True)])

    out = {"input_ids": padded(ids, PAD), "attention_mask": padded([[1] * len(x) for x in ids], 0)}
    family.collate(model.config, made, out)
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in out.items()}


def text_config(
    text: str, layers: int, d: int, heads: int, kv_heads: int, sliding_window: int | None = None
) -> Any:
    """Of one of the plain decoders, where half of Qwen's layers take the window."""
    kwargs: dict[str, Any] = {}
    if text == "mistral":
        kwargs["sliding_window"] = sliding_window  # its config's default is 4096, not None
    elif text in ("qwen2", "qwen3") and sliding_window is not None:
        kwargs |= windows(layers, sliding_window)
    elif sliding_window is not None:
        raise ValueError(f"no sliding window in a {text} text model")
    if text == "qwen3":
        kwargs["head_dim"] = d // heads  # its default is 128, whatever the width
    if text == "qwen3_moe":
        kwargs |= {
            "head_dim": d // heads,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        }
    if text == "gpt_oss":
        kwargs |= {
            "head_dim": d // heads,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 512,
        }
    return _TEXT_CONFIGS[text](**text_kwargs(layers, d, heads, kv_heads), **kwargs)


def windows(layers: int, sliding_window: int) -> dict[str, Any]:
    return {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": layers // 2}


def text_kwargs(layers: int, d: int, heads: int, kv_heads: int) -> dict[str, Any]:
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


def vision_kwargs(layers: int, image_size: int, patch_size: int = 4) -> dict[str, Any]:
    """Of the CLIP-like towers."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }


def build_model(
    cls: Callable[..., Any], config: Any, attn_implementation: str, dtype: torch.dtype, seed: int
) -> Any:
    if config.model_type in BROKEN:
        pytest.skip(BROKEN[config.model_type])
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
                zero = name.endswith("bias") or "Gemma" in _owner(
                    model, name
                )  # 1 + weight, but for Gemma 4's
                parameter.copy_(0.1 * noise + (0.0 if zero else 1.0))
            elif any(
                part in name
                for part in ("embed_tokens", "position_embedding", "positional_embedding", "pos_embed")
            ):
                parameter.copy_(noise)
            else:
                # queries and keys larger: attention logits of about +-2, neither flat nor one-hot
                gain = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
                # experts are (expert, in, out), all else (out, in, ...)
                fan_in = parameter.shape[1] if ".experts." in name else parameter[0].numel()
                parameter.copy_(gain / math.sqrt(fan_in) * noise)


def _owner(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__.replace("Gemma4", "")
