"""Prefill FLOPs of the decoder as a formula (a multiplication and an addition are two)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def decoder_flops(config: Any, lengths: Sequence[int]) -> int:
    """FLOPs of a prefill whose layer i sees `lengths[i]` tokens, per row of the batch.

    Per layer 4 n d (d_q + d_kv) + 4 n^2 d_q + 6 n d m: n tokens, d hidden size, d_q = heads x head_dim,
    d_kv = key-value heads x head_dim, m the width of the gated MLP. With d_kv = d_q = d it is EntropyPrune's
    8 n d^2 + 4 n^2 d + 6 n d m.

    Args:
        config: the text model's config.
        lengths: tokens per decoder layer.
    """
    d, m = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    d_q = heads * head_dim
    d_kv = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    total = 0
    for n, layers in Counter(lengths).items():
        total += layers * (4 * n * d * (d_q + d_kv) + 4 * n * n * d_q + 6 * n * d * m)
    return total
