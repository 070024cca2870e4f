"""What stock generate() cannot do, by family and version, so that nothing is asked of a pruned model that it cannot."""

from __future__ import annotations

from typing import Any

import pytest

Rows = list[list[str]]


def expandable(model: Any, rows: Rows) -> Rows:
    """Rows that stock expands rightly for beams and returned sequences.

    Releases before `_expand_multimodal_outputs` repeat pixels image by image (tile by tile, frame by frame)
    where they are not Qwen's or Idefics3's, so that the two images of a row end up in different rows.
    Llama4 alone breaks in the later ones: its features have another name and are not repeated at all.
    """
    kind = model.config.model_type
    video = any("video" in piece for row in rows for piece in row)
    if kind.startswith("glm") or kind == "gemma4":  # they repeat a row's features image by image
        return [["text:3", "video" if video else "image", "text:6"], ["text:7"]]
    if not old(model):
        if kind == "llama4":
            pytest.skip("stock does not repeat Llama4's image features")
        return rows
    if kind.startswith("qwen") or kind in ("idefics3", "smolvlm"):
        return rows
    if kind == "kimi_k25":
        pytest.skip("stock repeats patch by patch")
    if kind == "internvl" and video:
        pytest.skip("stock repeats frame by frame")
    image = "image:1x1" if kind in ("internvl", "llama4") else "image"
    return rows if video else [["text:3", image, "text:6"], ["text:7"], [image, "text:2"]]


def check(model: Any, options: dict[str, Any]) -> None:
    """Skip a way of generating that stock itself gets wrong or refuses."""
    kind = model.config.model_type
    if getattr(model, "_is_stateful", False) and "prompt_lookup_num_tokens" in options:
        pytest.skip("stock refuses assisted generation for models with recurrent states")
    if options.get("cache_implementation") == "static" and not static(model):
        pytest.skip("stock of this version does not answer the same with a static cache")
    if old(model) and kind == "paligemma" and options.get("use_cache") is False:
        pytest.skip(
            "stock of this version takes what PaliGemma generates for its prompt, which sees itself both ways"
        )


def static(model: Any) -> bool:
    """Older releases cannot make Llama 4's masks for a static cache, and forget Gemma 4's pictures in them."""
    return not (old(model) and model.config.model_type in ("llama4", "gemma4"))


def old(model: Any) -> bool:
    return not hasattr(model, "_expand_multimodal_outputs")
