"""Looking ahead inside vLLM: the first decoder layers on one image's tokens alone, by vLLM's own modules.

vLLM's attention works on its paged cache only, so that what stands between a layer's modules is written out here, for
decoders like Llama.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import ConfigError


def decoder_states(decoder: Any, embeds: Tensor, layers: int, names: tuple[str, ...]) -> dict[str, Any]:
    """What layers 0 to K - 1 make of an image's tokens if there were nothing else in the prompt.

    Args:
        decoder: vLLM's text model, with `layers`.
        embeds: (n, D) as the projector puts them out.
        layers: K.
        names: of "query", "key", "value" (of layer K - 1, rotated; (n, heads, head_dim)), "hidden" (entering layer K).
    """
    hidden, positions = embeds, torch.arange(len(embeds), device=embeds.device)
    found: dict[str, Tensor] = {}
    for i in range(layers):
        layer = decoder.layers[i]
        attention = layer.self_attn
        projected, _ = attention.qkv_proj(layer.input_layernorm(hidden))
        query, key, value = projected.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        query, key = attention.rotary_emb(positions, query, key)
        query, key, value = (_by_head(part, attention.head_dim) for part in (query, key, value))
        if i == layers - 1:
            found = {name: _of_all_ranks(x) for name, x in (("query", query), ("key", key), ("value", value))}
            if "hidden" not in names:
                break
        mixed, _ = attention.o_proj(_attend(query, key, value, attention.scaling))
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return {name: hidden if name == "hidden" else found[name] for name in names}


def check_decoder(decoder: Any) -> None:
    """Refuse a decoder that is not built like Llama.

    Raises:
        ConfigError: says so.
    """
    first = decoder.layers[0]
    wanted = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    parts = ("qkv_proj", "o_proj", "rotary_emb", "q_size", "kv_size", "head_dim", "scaling")
    if not all(hasattr(first, name) for name in wanted) or not all(
        hasattr(first.self_attn, n) for n in parts
    ):
        raise ConfigError(
            f"looking ahead is not served for decoders like {type(decoder).__name__}; serve vflowopt or uniform"
        )
    if hasattr(first.self_attn, "q_norm"):
        raise ConfigError(
            "looking ahead is not served for decoders that norm queries; serve vflowopt or uniform"
        )


def _by_head(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of one sequence, (n, heads, d) each -> (n, heads * d)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).flatten(1)


def _of_all_ranks(x: Tensor) -> Tensor:
    """The heads of every rank of a tensor-parallel decoder, so that all choose alike."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

    if get_tensor_model_parallel_world_size() == 1:
        return x
    return tensor_model_parallel_all_gather(x.contiguous(), dim=1)
