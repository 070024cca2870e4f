"""Tiny random multimodal models and inputs for the tests: built from configs, seeded, nothing downloaded.

A model is a stock `transformers` model, fp32 (unless asked otherwise) and in eval mode. Its weights are drawn
here, not by the library, so that they do not depend on the library's version, and so that attention is
peaked: dropping a few visual tokens then moves the logits by far more than any tolerance used in the tests.

`build(name)` makes any of `FAMILIES`; the builders take more arguments (text model, vision layers, ...).

Rows of a batch are lists of pieces, such as `["text:5", "image", "text:3", "image", "text:4"]`:

* `"text:N"`: N random text tokens (never a special token).
* `"image"`: one image, laid out as the family's processor does it, structural tokens included. Where a family
  knows several sizes, a plain `"image"` takes the next of its sizes in turn, so images of one batch differ.
* `"image:HxW"`: an image of that size, in the unit of the family's module.
* `"video"`: where the family has videos, with two frames or more; see the family's module.

Special tokens are suppressed in `generation_config`: every generated id is a text id (a generated image token
would be a placeholder without an image), and greedy search always makes `max_new_tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .anyres import AnyRes, OneVision, llava_next, llava_onevision
from .base import (
    BOS,
    BROKEN,
    EOS,
    FIRST_TEXT_ID,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Family,
    make_inputs,
)
from .gemma import Gemma3, Gemma4, PaliGemma, gemma3, gemma4, paligemma
from .glm import Glm, glm
from .llava import Llava, llava, vipllava
from .mistral import Mistral, mistral3
from .packed import Kimi, Paddle, kimi_k25, paddleocr_vl
from .qwen import QWEN_GRIDS, Qwen, Qwen3, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from .records import random_cuts, random_merges
from .tiles import Idefics, InternVL, Llama4, SmolVLM, idefics3, internvl, llama4, smolvlm

__all__ = [
    "BOS",
    "EOS",
    "FAMILIES",
    "FIRST_TEXT_ID",
    "IMAGE",
    "PAD",
    "QWEN_GRIDS",
    "VARIANTS",
    "VIDEO",
    "VISION_END",
    "VISION_START",
    "VOCAB",
    "build",
    "gemma3",
    "gemma4",
    "glm",
    "idefics3",
    "inputs",
    "internvl",
    "kimi_k25",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paddleocr_vl",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "random_cuts",
    "random_merges",
    "smolvlm",
    "vipllava",
    "visual_positions",
]

_BUILDERS: dict[str, Callable[..., Any]] = {
    "llava": llava,
    "llava_mistral": partial(llava, "mistral"),
    "llava_qwen2": partial(llava, "qwen2"),
    "llava_qwen3": partial(llava, "qwen3"),
    "vipllava": vipllava,
    "llava_next": llava_next,
    "llava_next_mistral": partial(llava_next, "mistral"),
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": partial(qwen3_vl, moe=True),
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": partial(qwen3_5, moe=True),
    "internvl": internvl,
    "internvl_qwen3_moe": partial(internvl, "qwen3_moe"),
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "gemma4": gemma4,
    "gemma4_moe": partial(gemma4, moe=True),
    "glm4v": glm,
    "glm46v": partial(glm, "glm46v"),
    "glm4v_moe": partial(glm, "glm4v_moe"),
    "mistral3": mistral3,
    "paddleocr_vl": paddleocr_vl,
    "kimi_k25": kimi_k25,
    "llama4": llama4,
}
FAMILIES = {name: builder for name, builder in _BUILDERS.items() if name not in BROKEN}

VARIANTS = (
    "internvl_qwen3_moe",
    *("qwen3_vl_moe", "qwen3_5_moe", "gemma4_moe", "glm46v", "glm4v_moe"),
)
"""Families that differ from another one by their feed-forward layers or by a name only."""

_LAYOUTS: dict[str, Family] = {
    "llava": Llava(),
    "vipllava": Llava(),
    "llava_next": AnyRes(),
    "llava_onevision": OneVision(),
    "qwen2_vl": Qwen(),
    "qwen2_5_vl": Qwen(),
    "qwen3_vl": Qwen3(),
    "qwen3_vl_moe": Qwen3(),
    "qwen3_5": Qwen3(),
    "qwen3_5_moe": Qwen3(),
    "internvl": InternVL(),
    "idefics3": Idefics(),
    "smolvlm": SmolVLM(),
    "gemma3": Gemma3(),
    "paligemma": PaliGemma(),
    "gemma4": Gemma4(),
    "glm4v": Glm(),
    "glm46v": Glm(),
    "glm4v_moe": Glm(),
    "mistral3": Mistral(),
    "paddleocr_vl": Paddle(),
    "kimi_k25": Kimi(),
    "llama4": Llama4(),
}


def build(name: str, **kwargs: Any) -> Any:
    """The model `name`; skips the test where it is none of `FAMILIES`, being `BROKEN`.

    Every builder takes layers, attn_implementation, dtype and seed; those with such layers sliding_window.
    """
    return _BUILDERS[name](**kwargs)


def inputs(
    model: PreTrainedModel, rows: Sequence[Sequence[str]], pad: str = "left", seed: int = 0
) -> dict[str, torch.Tensor]:
    """What a processor would return for these rows: ids, mask, pixels, and the family's extras.

    Pixels (and grids) are absent when no row has an image. The same pieces and seed give the same ids and
    pixels whatever the padding side.
    """
    return make_inputs(_LAYOUTS[model.config.model_type], model, rows, pad, seed)


def visual_positions(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """`[row][image]` -> the columns of `input_ids` where that image's prunable visual tokens stand, in order
    of the sequence.

    An image is what the family's module says: one image with all of its crops, one crop, one whole video.
    """
    return _LAYOUTS[model.config.model_type].positions(model.config, inputs)
