"""Attention backends other than sdpa and eager: flex, and flash attention emulated on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flash
import judge
import oracle
import tiny
import tokenprune

ROWS = [["text:5", "image", "text:3"], ["text:7"], ["text:2", "image", "text:1", "image", "text:6"]]
CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "random", "layer": 0, "keep": 0.4},
    "at_2": {"method": "entropyprune", "layer": 2, "keep": 0.5},
    "two": {"method": "random", "cuts": [(0, 0.7), (3, 0.3)]},
}
GEMMA4 = ("gemma4", "gemma4_moe")
# The others attend in both directions or in chunks, which flash attention's 2D mask cannot say: stock itself does
# not serve them.
CAUSAL = [name for name in tiny.FAMILIES if name not in ("gemma3", "paligemma", "llama4", *GEMMA4)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", CAUSAL)
def test_flash_emulated(family: str, cut: str, batch: int) -> None:
    model = tiny.build(family)
    inputs = tiny.inputs(model, ROWS[:batch], pad="left")
    if batch == 1:
        if family == "glm4v_moe":
            pytest.skip(
                "stock hands its layers positions with gaps, which flash attention takes for packed sequences"
            )
        del inputs["attention_mask"]
    positions = tiny.visual_positions(model, inputs)
    options = {
        "do_sample": False,
        "max_new_tokens": 4,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with flash.emulated(model), tokenprune.pruned(model, **judge.offered(model, CUTS[cut])), torch.no_grad():
        logits = model(**inputs).logits
        report = tokenprune.report(model)
        out = model.generate(**inputs, **options)
    cuts = judge.cuts_of(report)
    wanted = oracle.masked_forward(model, inputs, cuts, positions).logits
    assert report.index is not None
    assert judge.difference_at(report.index, logits, wanted, inputs.get("attention_mask")) <= judge.tolerance(
        model
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    steps = oracle.masked_forward(model, inputs, cuts, positions, generated=new, positions="generate").steps()
    assert float((torch.stack(out.logits, 1) - steps).abs().max()) <= judge.tolerance(model)


@pytest.mark.parametrize("cut", CUTS)
def test_flash_beyond_a_window_is_refused(cut: str) -> None:
    """Its window counts kept tokens, and it takes no mask that could say otherwise."""
    model = tiny.llava("mistral", sliding_window=20)
    inputs = tiny.inputs(model, ROWS[:1])
    with flash.emulated(model), tokenprune.pruned(model, **judge.offered(model, CUTS[cut])), torch.no_grad():
        with pytest.raises(tokenprune.UnsupportedModeError, match=r"longer than the span .* \(20\).*'sdpa'"):
            model(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cut", "batch"),  # stock Qwen-VL does not offer it
    [("llava", "before", 1), ("llava", "at_2", 1), ("llava", "two", 3), ("internvl", "at_2", 3)],
)
def test_flex(family: str, cut: str, batch: int) -> None:
    model = tiny.build(family, attn_implementation="flex_attention")
    twin = tiny.build(family)
    inputs = tiny.inputs(model, ROWS[:batch], pad="left")
    positions = tiny.visual_positions(twin, inputs)
    with tokenprune.pruned(model, **judge.offered(model, CUTS[cut])), torch.no_grad():
        logits = model(**inputs).logits
        report = tokenprune.report(model)
    wanted = oracle.masked_forward(twin, inputs, judge.cuts_of(report), positions).logits
    assert report.index is not None
    assert judge.difference_at(report.index, logits, wanted, inputs["attention_mask"]) <= judge.tolerance(
        model
    )
