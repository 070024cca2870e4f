"""What only a GPU can show: no waiting inside layers, the same choices as on a CPU, compiled decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import judge
import tiny
import tokenprune

pytestmark = pytest.mark.gpu

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform", "layer": 2, "keep": 0.5},
    "entropyprune": {"method": "entropyprune", "layer": 2, "keep": 0.5},
    "fastv": {"method": "fastv", "layer": 2, "keep": 0.5},
    "vflowopt": {"method": "vflowopt", "cuts": [(2, 0.7), (3, 0.4)]},
    "early": {"method": "entropyprune", "layer": 2, "keep": 0.5, "compact_early": True},
}


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


@pytest.mark.parametrize("rows", [judge.ROWS[:1], judge.ROWS], ids=["batch1", "ragged4"])
@pytest.mark.parametrize("name", METHODS)
def test_layers_never_wait_for_the_device(name: str, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 21: from layer 0 on, to the end of the call, nothing synchronises; nor does a decoding step."""
    monkeypatch.delenv("TOKENPRUNE_DEBUG")  # which copies what methods return
    model = tiny.llava().cuda()
    inputs = on_gpu(tiny.inputs(model, rows, pad="left"))
    first = model.model.language_model.layers[0]
    with tokenprune.pruned(model, **METHODS[name]), torch.no_grad():
        model(**inputs)  # tables that are made once, and kernels compiled
        handle = first.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
        try:
            cache = model(**inputs, use_cache=True).past_key_values
        finally:
            handle.remove()
            torch.cuda.set_sync_debug_mode("default")
        assert tokenprune.report(model).pruned
        token = inputs["input_ids"][:, -1:]
        positions = torch.full_like(token, inputs["input_ids"].shape[1])
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        call = {"input_ids": token, "position_ids": positions, "past_key_values": cache}
        handle = first.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
        try:
            model(**call, attention_mask=mask)
        finally:
            handle.remove()
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", METHODS)
def test_same_as_on_the_cpu(name: str) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    options = {"do_sample": False, "max_new_tokens": 6}
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        with tokenprune.pruned(model, **METHODS[name]):
            ids = model.generate(**{k: v.to(device) for k, v in inputs.items()}, **options)
            found.append((ids.cpu(), tokenprune.report(model).keep_lists))
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["uniform", "early"])
def test_compiled_decoding(name: str) -> None:
    """generate() compiles decoding with a static cache by itself on a GPU."""
    model = tiny.llava().cuda()
    inputs = on_gpu(tiny.inputs(model, judge.ROWS[:1]))
    options = {"do_sample": False, "max_new_tokens": 6}
    with tokenprune.pruned(model, **METHODS[name]):
        wanted = model.generate(**inputs, **options)
        found = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(wanted, found)
