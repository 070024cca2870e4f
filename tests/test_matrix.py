"""Every family, in every way it is called, against the masked oracle (contract 7)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import judge
import tiny
import tokenprune

BATCHES = {
    "one": [["text:5", "image", "text:4"]],
    "several": [["text:3", "image", "text:2", "image", "text:4"]],
    "ragged": [["text:5", "image", "text:3"], ["text:7"], ["text:2", "image", "text:1", "image", "text:6"]],
    "video": [["text:3", "video", "text:4"], ["text:2", "image", "text:5"]],
    "videos": [["text:3", "video", "text:4"], ["text:2", "video", "text:1", "video", "text:5"]],
}
CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "random", "layer": 0, "keep": 0.4},
    "at_1": {"method": "random", "layer": 1, "keep": 0.4},
    "two": {"method": "random", "cuts": [(0, 0.7), (3, 0.3)]},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_and_greedy(family: str, batch: str, cut: str, attention: str) -> None:
    if attention == "eager" and family in tiny.VARIANTS:
        pytest.skip("as its sibling")
    model = tiny.build(family, attn_implementation=attention)
    rows = BATCHES[batch]
    try:
        inputs = tiny.inputs(model, rows, pad="left")
    except ValueError as error:
        pytest.skip(str(error))
    assert judge.prefill_difference(model, inputs, **CUTS[cut]) <= judge.tolerance(model)
    greedy = {"do_sample": False, "max_new_tokens": 3}
    assert judge.generate_difference(model, inputs, greedy, **CUTS[cut])[0] <= judge.tolerance(model)


@pytest.mark.parametrize(
    "arguments", [{"method": "uniform", "keep": 1.0}, {"method": "vflowopt", "keep": 1.0}]
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeping_everything_is_equal_to_the_bit(family: str, arguments: dict[str, Any]) -> None:
    model = tiny.build(family)
    prefix = [["image", "text:12"], ["image", "text:12"]]
    inputs = tiny.inputs(model, prefix if family == "paligemma" else judge.ROWS)
    with torch.no_grad():
        wanted = model(**inputs).logits
        with tokenprune.pruned(model, **arguments):
            assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("cut", CUTS)
def test_prompt_that_sees_itself_both_ways_without_a_mask(cut: str) -> None:
    """PaliGemma without token types and padding: its attention is given no mask, and that is not a causal one."""
    model = tiny.build("paligemma")
    inputs = tiny.inputs(model, [["image", "text:12"], ["image", "text:12"]])
    del inputs["token_type_ids"], inputs["attention_mask"]
    positions = tiny.visual_positions(model, inputs)
    lists = [tiny.random_cuts(positions, [3], [share])[0][1] for share in (0.6, 0.3)]
    ragged = {"layer": 2, "keep_lists": [[lists[0][0], lists[1][1]]]}
    assert len(lists[0][0][0]) != len(lists[1][1][0])
    for arguments in (CUTS[cut], {"method": "random", **ragged}):
        assert judge.prefill_difference(model, inputs, **arguments) <= judge.tolerance(model)
