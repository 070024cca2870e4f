"""Contract 17: the report's FLOPs, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tiny
from tokenprune.models import find_family
from tokenprune.runtime.flops import LayerCost, layer_costs, prefill_flops


def costs_of(model: Any) -> list[LayerCost]:
    return layer_costs(find_family(model))


def test_llama_7b() -> None:
    """8 n d^2 + 4 n^2 d + 6 n d m with n = 640, d = 4096, m = 11008: 85.9 + 6.7 + 173.1 GFLOPs per layer."""
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32
    )
    with torch.device("meta"):
        costs = costs_of(LlavaForConditionalGeneration(LlavaConfig(text_config=text)))
    per_layer = 85_899_345_920 + 6_710_886_400 + 173_140_869_120
    assert prefill_flops(costs, [640]) == per_layer
    assert prefill_flops(costs, [640] * 32) == 32 * per_layer
    # Two layers at 640 tokens, thirty at 320: every linear term halves, the quadratic one falls to a quarter.
    assert prefill_flops(costs, [640] * 2 + [320] * 30) == 2 * per_layer + 30 * (
        42_949_672_960 + 1_677_721_600 + 86_570_434_560
    )


def test_grouped_queries() -> None:
    """n = 3, d = 64, 4 heads of 16, 2 of keys (d_kv = 32), m = 128: 4 n d (d_q + d_kv) + 4 n^2 d_q + 6 n d m."""
    costs = costs_of(tiny.llava(layers=2, d=64, heads=4, kv_heads=2))
    per_layer = 4 * 3 * 64 * (64 + 32) + 4 * 9 * 64 + 6 * 3 * 64 * 128
    assert prefill_flops(costs, [3]) == per_layer and prefill_flops(costs, [3, 3]) == 2 * per_layer


def test_a_mixture_counts_the_experts_a_token_is_sent_to() -> None:
    """Two of four experts of width 32, and a router of four rows."""
    costs = costs_of(tiny.build("qwen3_vl_moe"))
    attention, experts, router = 4 * 64 * (64 + 32), 2 * 6 * 64 * 32, 2 * 4 * 64
    assert set(costs) == {LayerCost(attention + experts + router, 4 * 64)}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_recurrent_layers_have_no_pairs(name: str) -> None:
    """Gated DeltaNet: q, k (2 heads of 16), v, z, out (4 heads of 16), a, b (4), a convolution over four tokens."""
    costs = costs_of(tiny.build(name))
    assert [cost.pair for cost in costs] == [0, 4 * 64] * 3
    mixer = 2 * (64 * (32 + 32 + 64) + 64 * 64 + 64 * 64 + 2 * 64 * 4 + 4 * 128) + 6 * 4 * 16 * 16
    attention = 2 * 64 * (2 * 64 + 2 * 32 + 64)  # queries come with a gate
    assert costs[0].token - costs[1].token == mixer - attention
