"""Layers that look back only so far: distances count in original columns, at any length (contract 11)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import judge
import limits
import oracle
import tiny
import tokenprune

ROWS = [["text:15", "image", "text:8"], ["text:3"], ["text:2", "image", "image", "text:4"]]
MODELS: dict[str, Any] = {
    "mistral": lambda **options: tiny.llava("mistral", **options),
    "qwen2": lambda **options: tiny.llava("qwen2", **options),
    "qwen3": lambda **options: tiny.llava("qwen3", **options),
    "qwen2_5_vl": tiny.qwen2_5_vl,
    "gemma3": tiny.gemma3,
    "gemma4": tiny.gemma4,
}
CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "random", "layer": 0, "keep": 0.5},
    "at_1": {"method": "random", "layer": 1, "keep": 0.6},
    "two": {"method": "random", "cuts": [(1, 0.7), (3, 0.3)]},
    "size_terms": {"method": "vflowopt", "keep": 0.5},
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
}


@pytest.mark.parametrize("window", [8, 24, 40], ids="window={}".format)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", MODELS)
def test_beyond_the_window(name: str, cut: str, attention: str, window: int) -> None:
    """The window ends among dropped tokens, among kept ones, and is crossed while decoding."""
    model = MODELS[name](sliding_window=window, attn_implementation=attention)
    inputs = tiny.inputs(model, ROWS, pad="left")
    assert inputs["input_ids"].shape[1] > window
    assert judge.prefill_difference(model, inputs, **CUTS[cut]) <= judge.TOLERANCE
    for mode in (*MODES.values(), {"past_key_values": DynamicCache()}):  # this one keeps every entry
        if "cache_implementation" in mode and not limits.static(model):
            continue
        options = {"do_sample": False, "max_new_tokens": 4, **mode}
        assert judge.generate_difference(model, inputs, options, **CUTS[cut])[0] <= judge.TOLERANCE


@pytest.mark.parametrize("chunk", [16, 200], ids="chunk={}".format)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", CUTS)
def test_chunks_and_temperature(cut: str, attention: str, chunk: int) -> None:
    """Llama 4: chunks end among dropped tokens; queries far into the conversation are scaled by their column."""
    model = tiny.llama4(sliding_window=chunk, floor_scale=8, attn_implementation=attention)
    inputs = tiny.inputs(model, ROWS, pad="left")
    assert judge.prefill_difference(model, inputs, **CUTS[cut]) <= judge.TOLERANCE
    for mode in MODES.values():
        if "cache_implementation" in mode and not limits.static(model):
            continue
        options = {"do_sample": False, "max_new_tokens": 4, **mode}
        assert judge.generate_difference(model, inputs, options, **CUTS[cut])[0] <= judge.TOLERANCE


@pytest.mark.parametrize("plain", [False, True], ids=["windows", "plain"])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2_5_vl"])
def test_compact_early_leaves_windows_alone(name: str, plain: bool) -> None:
    """Whatever cache holds the layers that look back only so far, they keep what they were given."""
    model = MODELS[name](sliding_window=24)
    inputs = tiny.inputs(model, ROWS, pad="left")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    if plain:
        options["past_key_values"] = DynamicCache()
    cut = {"method": "random", "layer": 3, "keep": 0.7}
    assert judge.generate_difference(model, inputs, options, compact_early=True, **cut)[0] <= judge.TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("plain", [False, True], ids=["windows", "plain"])
@pytest.mark.parametrize("cut", ["at_1", "size_terms_at_2"])
def test_a_picture_longer_than_the_window_in_a_later_turn(cut: str, plain: bool, attention: str) -> None:
    """Gemma 3: the tokens of a picture see each other both ways, however far apart they are."""
    cuts: dict[str, Any] = {**CUTS, "size_terms_at_2": {"method": "vflowopt", "layer": 2, "keep": 0.6}}
    model = tiny.gemma3(sliding_window=6, attn_implementation=attention)
    one, two = (tiny.inputs(model, [["text:4", "image", "text:3"]], seed=seed) for seed in (0, 1))
    length = one["input_ids"].shape[1]
    assert len(tiny.visual_positions(model, two)[0][0]) > 6
    mask = torch.ones(1, 2 * length, dtype=torch.long)
    positions = torch.arange(2 * length)[None]
    cache = DynamicCache() if plain else DynamicCache(config=model.config.text_config)
    reports = []
    with tokenprune.pruned(model, **cuts[cut]), torch.no_grad():
        model(**one, past_key_values=cache, position_ids=positions[:, :length])
        reports.append(tokenprune.report(model))
        call = {**two, "attention_mask": mask, "position_ids": positions[:, length:]}
        call["token_type_ids"] = torch.cat(
            [one["token_type_ids"], two["token_type_ids"]], 1
        )  # as stock wants them
        turn = model(**call, past_key_values=cache).logits
        reports.append(tokenprune.report(model))
    history = {
        "attention_mask": mask,
        "position_ids": positions,
        **{n: torch.cat([one[n], two[n]], 1) for n in ("input_ids", "token_type_ids")},
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
    }
    places = tiny.visual_positions(model, history)
    first, second = reports
    layers = zip(first.layers_cut, first.keep_lists, second.keep_lists, strict=True)
    wanted = oracle.masked_forward(
        model,
        history,
        [(layer, [[*a[0], *b[0]]]) for layer, a, b in layers],
        places,
        [[[a.get((0, 0)), b.get((0, 0))]] for a, b in zip(first.merges, second.merges, strict=True)],
        biases=[[[a.get((0, 0)), b.get((0, 0))]] for a, b in zip(first.biases, second.biases, strict=True)],
    ).logits
    assert second.index is not None
    assert judge.difference_at(second.index, turn, wanted[:, length:], None) <= judge.TOLERANCE
