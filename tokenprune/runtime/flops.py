"""Prefill FLOPs of the decoder as a formula (a multiplication and an addition are two), read off its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenprune.models.base import Family


@dataclass(frozen=True)
class LayerCost:
    """What a decoder layer computes.

    Attributes:
        token: FLOPs per token: twice its weights, of a mixture's experts only those a token is sent to; of a recurrent
            layer also its state's update.
        pair: FLOPs per pair of tokens: what attention adds.
    """

    token: int
    pair: int

    def of(self, tokens: int) -> int:
        return self.token * tokens + self.pair * tokens**2


def layer_costs(family: Family) -> list[LayerCost]:
    """Of each decoder layer.

    A dense layer of attention is 4 n d (d_q + d_kv) + 4 n^2 d_q + 6 n d m: n tokens, d hidden size, d_q = heads x
    head_dim, d_kv = key-value heads x head_dim, m the width of the gated MLP. With d_kv = d_q = d it is EntropyPrune's
    8 n d^2 + 4 n^2 d + 6 n d m. A window's pairs are counted as if it were none.
    """
    text: Any = family.text_model().config
    attending = set(family.attending())
    costs = []
    for i, layer in enumerate(family.layers()):
        token, pair = 2 * sum(_weights(layer, text)), 0
        if i in attending:
            attention: Any = family.attention(layer)
            pair = 2 * text.num_attention_heads * sum(_head_dims(attention))
        else:
            token += _state_update(text)
        costs.append(LayerCost(token, pair))
    return costs


def prefill_flops(costs: Sequence[LayerCost], lengths: Iterable[int]) -> int:
    """Of a row whose layer i sees `lengths[i]` tokens."""
    alike = Counter(zip(costs, lengths, strict=False))
    return sum(times * cost.of(tokens) for (cost, tokens), times in alike.items())


def _weights(layer: nn.Module, text: Any) -> Iterable[int]:
    """Weights that a token is multiplied by, matrix by matrix."""
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or 1
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):  # of quantised ones, packed weights would not tell
            yield module.in_features * module.out_features
            continue
        for parameter in module.parameters(recurse=False):
            if "experts" in name.split("."):
                if parameter.ndim == 3:  # others are biases
                    yield parameter[0].numel() * chosen
            elif parameter.ndim > 1:
                yield parameter.numel()


def _head_dims(attention: Any) -> tuple[int, int]:
    """Of queries and of values, which latent attention has of different sizes."""
    query = getattr(attention, "qk_head_dim", None) or attention.head_dim
    return int(query), int(getattr(attention, "v_head_dim", None) or query)


def _state_update(text: Any) -> int:
    """The delta rule per token and value head: read by the key, written, read by the query, each 2 d_k d_v."""
    sizes = [
        getattr(text, f"linear_{name}", 0) for name in ("num_value_heads", "key_head_dim", "value_head_dim")
    ]
    return 6 * int(sizes[0]) * int(sizes[1]) * int(sizes[2])
