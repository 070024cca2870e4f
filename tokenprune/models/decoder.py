"""Text decoders: where the queries, keys and values of a layer can be had, and how rotary embeddings turn them.

Most multimodal families take several text decoders, so this is told by the decoder's own type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModelError

# The norm of a head's queries and keys comes after the projection, and of Gemma 3 after heads and tokens are swapped.
_PLAIN = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "gemma", "gemma2")
_NORMED = ("qwen3", "qwen3_vl_text", "gemma3_text")
_HEADS_FIRST = ("gemma3_text",)
_COMPLEX = ("llama4_text",)
TEXT_TYPES = (*_PLAIN, *_NORMED, *_COMPLEX)


def check_states(text_config: Any) -> None:
    """Raises UnsupportedModelError where the states of a decoder's layers cannot be had."""
    if text_config.model_type not in TEXT_TYPES:
        raise UnsupportedModelError(
            f"queries, keys and values of {text_config.model_type!r} decoders are not available (only of "
            f"{', '.join(TEXT_TYPES)}); use a method that does not need them, or source='hidden'"
        )


def state_module(attention: Any, state: str) -> nn.Module:
    """The module whose output is a layer's "query", "key" or "value" states before rotary embedding."""
    if state != "value" and attention.config.model_type in _NORMED:
        return getattr(attention, f"{state[0]}_norm")
    return getattr(attention, f"{state[0]}_proj")


def by_token(attention: Any, state: str, output: Tensor) -> Tensor:
    """The output of `state_module` as (B, L, heads, head_dim)."""
    if output.ndim == 3:
        return output.unflatten(-1, (-1, attention.head_dim))
    return output.transpose(1, 2) if attention.config.model_type in _HEADS_FIRST else output


def rotate(attention: Any, x: Tensor, rope: Any) -> Tensor:
    """Apply a layer's rotary embedding to x (n, heads, d).

    Args:
        attention: the layer's attention module.
        x: queries or keys.
        rope: its `position_embeddings` at the n tokens: cos and sin (n, d'), d' <= d, or one complex (n, d / 2).
    """
    if attention.config.model_type in _COMPLEX:
        if attention.use_rope:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * rope.to(x.device)[:, None]).flatten(-2).type_as(x)
        return attention.qk_norm(x) if hasattr(attention, "qk_norm") else x
    cos, sin = (part.to(x.device).unsqueeze(1) for part in rope)
    width = cos.shape[-1]
    first, second = x[..., :width].chunk(2, dim=-1)
    turned = x[..., :width] * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
