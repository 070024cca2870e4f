"""Every family, in every way it is called, against the masked oracle (contract 7)."""

from __future__ import annotations

from typing import Any

import pytest

import judge
import tiny

BATCHES = {
    "one": [["text:5", "image", "text:4"]],
    "several": [["text:3", "image", "text:2", "image", "text:4"]],
    "ragged": [["text:5", "image", "text:3"], ["text:7"], ["text:2", "image", "text:1", "image", "text:6"]],
    "video": [["text:3", "video", "text:4"], ["text:2", "image", "text:5"]],
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
    model = tiny.build(family, attn_implementation=attention)
    rows = BATCHES[batch]
    try:
        inputs = tiny.inputs(model, rows, pad="left")
    except ValueError as error:
        pytest.skip(str(error))
    assert judge.prefill_difference(model, inputs, **CUTS[cut]) <= judge.TOLERANCE
    greedy = {"do_sample": False, "max_new_tokens": 3}
    assert judge.generate_difference(model, inputs, greedy, **CUTS[cut])[0] <= judge.TOLERANCE
