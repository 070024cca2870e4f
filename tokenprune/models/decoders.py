"""Text decoders: where the queries, keys and values of a layer can be had, and how rotary embeddings turn them.

Most multimodal families take several text decoders, so this is told by the decoder's own type: one class per kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError


class Decoder:
    """Llama and its like: states come out of the projections, rotary embeddings are cosines and sines.

    Class attributes:
        model_types: values of `model_type` in the text config it is for.
    """

    model_types: ClassVar[tuple[str, ...]] = (
        *("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "gemma", "gemma2"),
        *("glm4v_moe_text", "paddleocr_vl_text"),
    )

    def state_module(self, attention: Any, state: str) -> nn.Module:
        """The module whose output is a layer's "query", "key" or "value" states before rotary embedding."""
        return getattr(attention, f"{state[0]}_proj")

    def by_token(self, attention: Any, output: Tensor) -> Tensor:
        """The output of `state_module` as (B, L, heads, head_dim)."""
        return output.unflatten(-1, (-1, attention.head_dim)) if output.ndim == 3 else output

    def rope_of(self, rope: Any, pick: Callable[[Tensor], Tensor]) -> Any:
        """The rotary embedding of some tokens: `pick` takes them out of each of its tensors (B | 1, L, d')."""
        return tuple(pick(part) for part in rope)

    def rotate(self, attention: Any, x: Tensor, rope: Any) -> Tensor:
        """Apply a layer's rotary embedding to queries or keys.

        Args:
            attention: the layer's attention module.
            x: (n, heads, d).
            rope: its `position_embeddings` at the n tokens: cos and sin (n, d'), d' <= d.
        """
        cos, sin = (part.to(x.device).unsqueeze(1) for part in rope)
        width = cos.shape[-1]
        turned = x[..., :width] * cos + self.quarter_turn(x[..., :width]) * sin
        return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)

    def quarter_turn(self, x: Tensor) -> Tensor:
        """Each pair of coordinates turned by 90 degrees."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    def turns_heads_alike(self, text_model: Any) -> bool:
        """Whether `rotate` is a turn of all heads by the same angles, lengths kept (YaRN, for one, scales them)."""
        scaling = getattr(getattr(text_model, "rotary_emb", None), "attention_scaling", None)
        return scaling == 1.0

    def temperature(self, attention: Any, columns: Tensor) -> Tensor | None:
        """By what a layer multiplies its queries at these columns of the conversation; None where it does not."""
        return None


class InterleavedDecoder(Decoder):
    """GLM-4: the coordinates of a pair are neighbours."""

    model_types = ("glm4v_text", "glm_ocr_text")

    def quarter_turn(self, x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


class GptOssDecoder(Decoder):
    """gpt-oss: the rotary embedding says every angle once."""

    model_types = ("gpt_oss",)

    def rotate(self, attention: Any, x: Tensor, rope: Any) -> Tensor:
        return super().rotate(attention, x, tuple(torch.cat((part, part), dim=-1) for part in rope))


class NormedDecoder(Decoder):
    """Qwen3: queries and keys are normed by head after the projection."""

    model_types: ClassVar[tuple[str, ...]] = (
        *("qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text"),
    )

    def state_module(self, attention: Any, state: str) -> nn.Module:
        if state == "value":
            return super().state_module(attention, state)
        return getattr(attention, f"{state[0]}_norm")


class Gemma3Decoder(NormedDecoder):
    """Gemma 3: the norms come after heads and tokens are swapped."""

    model_types = ("gemma3_text",)

    def by_token(self, attention: Any, output: Tensor) -> Tensor:
        return super().by_token(attention, output) if output.ndim == 3 else output.transpose(1, 2)


class Gemma4Decoder(NormedDecoder):
    """Gemma 4: values are normed, too; some layers have no projection of their own for them."""

    model_types = ("gemma4_text",)

    def state_module(self, attention: Any, state: str) -> nn.Module:
        return getattr(attention, f"{state[0]}_norm")


class Llama4Decoder(Decoder):
    """Llama 4: rotary embeddings are complex numbers, some layers have none and a temperature instead."""

    model_types = ("llama4_text",)

    def rope_of(self, rope: Any, pick: Callable[[Tensor], Tensor]) -> Any:
        return pick(rope)

    def turns_heads_alike(self, text_model: Any) -> bool:
        return False  # it norms after the turn

    def rotate(self, attention: Any, x: Tensor, rope: Any) -> Tensor:
        if attention.use_rope:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * rope.to(x.device)[:, None]).flatten(-2).type_as(x)
        return attention.qk_norm(x) if hasattr(attention, "qk_norm") else x

    def temperature(self, attention: Any, columns: Tensor) -> Tensor | None:
        if attention.use_rope or not attention.attn_temperature_tuning:
            return None
        return (
            torch.log1p(torch.floor((columns.float() + 1) / attention.floor_scale)) * attention.attn_scale + 1
        )


# Kinds of layers that fold what came before into a state of one size (Gated DeltaNet, short convolutions).
_RECURRENT = ("linear_attention", "conv")


def attends(text_config: Any, layer: int) -> bool:
    """Whether a decoder layer attends, to what its cache holds keys of; others are recurrent and have none."""
    types = getattr(text_config, "layer_types", None)
    return not types or types[layer] not in _RECURRENT


def attention_backend(text_config: Any) -> str:
    return str(getattr(text_config, "_attn_implementation", None) or "eager")


def takes_biases(text_config: Any) -> bool:
    """Whether the attention it runs takes a mask of floats: flash and flex do not."""
    backend = attention_backend(text_config)
    return "flash" not in backend and "flex" not in backend


_PLAIN = Decoder()
DECODERS: dict[str, Decoder] = {
    name: decoder
    for decoder in (
        _PLAIN,
        InterleavedDecoder(),
        GptOssDecoder(),
        NormedDecoder(),
        Gemma3Decoder(),
        Gemma4Decoder(),
        Llama4Decoder(),
    )
    for name in decoder.model_types
}


def find_decoder(text_config: Any) -> Decoder:
    """The kind of a text model. One that is not known can be cut, but `check_states` refuses to score it."""
    return DECODERS.get(text_config.model_type, _PLAIN)


def offers_states(text_config: Any) -> bool:
    """Whether the states of a decoder's layers can be had."""
    return text_config.model_type in DECODERS


def check_states(text_config: Any) -> None:
    """Raises UnsupportedModelError where the states of a decoder's layers cannot be had."""
    if not offers_states(text_config):
        raise UnsupportedModelError(
            f"queries, keys and values of {text_config.model_type!r} decoders are not available: nobody here has "
            f"looked at how they are made; use a method that does not need them, or source='hidden'"
        )
