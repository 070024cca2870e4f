"""The supported model families, one file each, found by the model's config."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from tokenprune.errors import ConfigError, UnsupportedModelError, UntestedWarning
from tokenprune.models.base import Family
from tokenprune.models.gemma3 import Gemma3
from tokenprune.models.gemma4 import Gemma4
from tokenprune.models.generic import Generic
from tokenprune.models.glm4v import Glm4v
from tokenprune.models.idefics3 import Idefics3, SmolVLM
from tokenprune.models.internvl import InternVL
from tokenprune.models.kimi_k25 import KimiK25
from tokenprune.models.llama4 import Llama4
from tokenprune.models.llava import Llava
from tokenprune.models.llava_next import LlavaNext
from tokenprune.models.llava_onevision import LlavaOnevision
from tokenprune.models.mistral3 import Mistral3
from tokenprune.models.paddleocr_vl import PaddleOCRVL
from tokenprune.models.paligemma import PaliGemma
from tokenprune.models.qwen2_5_vl import Qwen25VL
from tokenprune.models.qwen2_vl import Qwen2VL
from tokenprune.models.qwen3_5 import Qwen35
from tokenprune.models.qwen3_vl import Qwen3VL
from tokenprune.models.vipllava import VipLlava

_ALL: tuple[type[Family], ...] = (
    Llava,
    LlavaNext,
    LlavaOnevision,
    VipLlava,
    Qwen2VL,
    Qwen25VL,
    Qwen3VL,
    Qwen35,
    Glm4v,
    Mistral3,
    PaddleOCRVL,
    KimiK25,
    InternVL,
    Idefics3,
    SmolVLM,
    Gemma3,
    Gemma4,
    PaliGemma,
    Llama4,
)
FAMILIES: dict[str, type[Family]] = {family.name: family for family in _ALL}

# Why a well-known model cannot be served.
REFUSED = {
    "mllama": "its images are read by cross-attention: there are no visual tokens in the sequence to prune",
    "gemma3n": "its layers get an input of their own for every token, and the last ones borrow keys of earlier ones, "
    "which nobody here shortens",
}

# Checkpoints as their authors released them, by model_type, and the twin that transformers reads.
TWINS = {
    "llava_llama": "llava-hf/llava-1.5-7b-hf (or llava-hf/llava-v1.6-vicuna-7b-hf)",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl_chat": "OpenGVLab/InternVL3-8B-hf",
}

# What people put around a model, by class, and what to give instead.
WRAPPERS = {
    "OptimizedModule": "wrap the model before torch.compile (or the compiled one's ._orig_mod)",
    "DataParallel": "give its .module, on one GPU: replicas share hooks; use DistributedDataParallel or device_map",
    "DistributedDataParallel": "give its .module",
    "FullyShardedDataParallel": "give its .module",
}


def stock_model(model: object) -> nn.Module:
    """The transformers model itself: `model`, or the one inside a PEFT wrapper.

    Raises:
        UnsupportedModelError: not a model at all, or one inside another wrapper.
    """
    for kind, instead in WRAPPERS.items():
        if any(cls.__name__ == kind for cls in type(model).__mro__):
            raise UnsupportedModelError(f"a {kind} is not the model itself; {instead}")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, nn.Module) or not hasattr(inner, "config"):
        raise UnsupportedModelError(
            f"expected a loaded transformers model, got {type(model).__name__}; load it with from_pretrained first"
        )
    return inner


def find_family(model: nn.Module, asked: str | type[Family] | None = None) -> Family:
    """The family of a stock model, bound to it.

    Args:
        model: stock.
        asked: a family of the user's own, or the name of one of ours, instead of what the model's config says.

    Raises:
        UnsupportedModelError: names the model's type and what is supported.
        ConfigError: no family has the name.
    """
    if asked is not None:
        return _asked_for(model, FAMILIES.get(asked, asked) if isinstance(asked, str) else asked)
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    for family in FAMILIES.values():
        if kind in family.model_types:
            _check_head(model)
            bound = family(model)
            bound.check_model()
            return bound
    if kind in REFUSED:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {kind!r}) is not supported: {REFUSED[kind]}"
        )
    if kind in TWINS:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a {kind!r} model of its authors' own code; prune its twin in transformers, "
            f"{TWINS[kind]}"
        )
    return _unknown(model, kind)


def _check_head(model: nn.Module) -> None:
    """Refuse what finds its states by their columns in the input; a body alone (models that embed) gives them all.

    Raises:
        UnsupportedModelError: names the class.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and hasattr(model, "model"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has another head than a language model's, which looks for its states where they "
            f"were before pruning; wrap the class ...ForConditionalGeneration, or the body alone"
        )


def _unknown(model: nn.Module, kind: str) -> Family:
    """What is tried on a model of a type that is not known.

    Raises:
        UnsupportedModelError: its layout is not the usual one.
    """
    try:
        family = Generic(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {kind!r}) is not supported ('tokenprune models' lists what is), and "
            f"its layout is not the usual one: {error}; pass a Family of your own as family= (docs/family.md)"
        ) from None
    warnings.warn(
        f"{type(model).__name__} (model_type {kind!r}) is of no known family: its first prompt is run twice, pruned "
        f"and with what was dropped masked, and refused if they differ; nobody looks into its vision tower",
        UntestedWarning,
        stacklevel=2,
    )
    return family


def misfit(name: str, model: nn.Module, error: Exception) -> UnsupportedModelError:
    """What a family raises on a model that is not laid out as it thinks, as an error that says so."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UnsupportedModelError(
        f"family={name!r} does not fit a {type(model).__name__}: {reason}; leave family out, or pass a Family "
        f"of your own"
    )


def _asked_for(model: nn.Module, asked: Any) -> Family:
    """A family that was named or given, bound to the model.

    Raises:
        ConfigError: it is none.
        UnsupportedModelError: the model does not have its parts; names what is missing.
    """
    if not (isinstance(asked, type) and issubclass(asked, Family)):
        raise ConfigError(
            f"unknown family {asked!r}; choose one of {', '.join(FAMILIES)}, or pass a subclass of Family"
        )
    try:
        family = asked(model)
        family.base(), family.final_norm(), family.vision_tower()
        family.attention(family.layers()[family.attending()[0]])
        family.token_id("image"), family.decoder()
        family.check_model()
    except Exception as error:  # whatever a foreign layout makes it raise
        raise misfit(asked.name, model, error) from error
    return family


__all__ = ["FAMILIES", "REFUSED", "Family", "find_family", "stock_model"]
