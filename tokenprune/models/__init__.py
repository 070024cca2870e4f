"""The supported model families, one file each, found by the model's config."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenprune.errors import UnsupportedModelError
from tokenprune.models.base import Family
from tokenprune.models.llava import Llava
from tokenprune.models.qwen2_5_vl import Qwen25VL

FAMILIES: dict[str, Family] = {f.name: f for f in (Llava(), Qwen25VL())}


def stock_model(model: object) -> nn.Module:
    """The transformers model itself: `model`, or the one inside a PEFT wrapper.

    Raises:
        UnsupportedModelError: not a model at all.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, nn.Module) or not hasattr(inner, "config"):
        raise UnsupportedModelError(
            f"expected a loaded transformers model, got {type(model).__name__}; load it with from_pretrained first"
        )
    return inner


def find_family(model: nn.Module) -> Family:
    """The family of a stock model.

    Raises:
        UnsupportedModelError: names the model's type and what is supported.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    for family in FAMILIES.values():
        if kind in family.model_types and hasattr(model, "lm_head"):
            text = getattr(config.get_text_config(), "model_type", None)
            if family.text_types and text not in family.text_types:
                raise UnsupportedModelError(
                    f"{kind} with a {text!r} text model is not supported; supported: {', '.join(family.text_types)}"
                )
            return family
    supported = ", ".join(sorted(t for f in FAMILIES.values() for t in f.model_types))
    raise UnsupportedModelError(
        f"{type(model).__name__} (model_type {kind!r}) is not supported; supported: {supported}, with a language head "
        f"(the ...ForConditionalGeneration class)"
    )


__all__ = ["FAMILIES", "Family", "find_family", "stock_model"]
