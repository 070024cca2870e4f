"""Contract 21 and 22: nothing is copied to the host inside layers or on decode steps, no n x n map is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import judge
import tiny
import tokenprune
from tokenprune.runtime.forward import CallHooks
from tokenprune.runtime.layers import LayerHooks
from tokenprune.runtime.taps import Taps
from tokenprune.runtime.tower import TowerTap

REFUSED = {"_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "masked_select"}


class Refuse(TorchDispatchMode):
    """Fails on operators that must wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in REFUSED:
            raise AssertionError(f"{name} copies from the device to the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def refusing(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[list[str]]:
    """Run the runtime's hooks of these names under `Refuse`; yields which ones ran."""
    ran: list[str] = []
    with monkeypatch.context() as patch:
        patch.delenv("TOKENPRUNE_DEBUG", raising=False)
        for name in names:
            owner = next(c for c in (CallHooks, LayerHooks, Taps, TowerTap) if name in vars(c))
            original = getattr(owner, name)

            def guarded(self: Any, *args: Any, original: Any = original, name: str = name) -> Any:
                ran.append(name)
                with Refuse():
                    return original(self, *args)

            patch.setattr(owner, name, guarded)
        yield ran


LAYERS = ("_enter_layer", "_enter_text_model", "_enter_attention", "_catch_state")
DECODE = ("_enter", "_leave", *LAYERS)
CUTS: list[dict[str, Any]] = [
    {"method": "entropyprune", "layer": 2, "keep": 0.5},
    {"method": "entropyprune", "layer": 2, "keep": 0.5, "normalization": "trace", "source": "hidden"},
    {"method": "random", "cuts": [(0, 0.6), (3, 0.3)]},
    {"method": "uniform", "layer": 1, "keep": 0.4},
]


@pytest.mark.parametrize("cut", CUTS, ids=["query", "hidden", "random2", "uniform"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny.llava, tiny.qwen2_5_vl], ids=["llava", "qwen2_5_vl"])
def test_no_copy_in_layers(
    build: Any, attn: str, cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(attn_implementation=attn)
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    with refusing(monkeypatch, *LAYERS) as ran, tokenprune.pruned(model, **cut):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert {"_enter_layer", "_enter_text_model"} <= set(ran)
    assert ("_catch_state" in ran) == (cut.get("method") == "entropyprune" and "source" not in cut)


@pytest.mark.parametrize("cut", CUTS[::2], ids=["query", "random2"])
def test_no_copy_on_decode_steps(cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    with tokenprune.pruned(model, **cut), torch.no_grad():
        cache = model(**inputs).past_key_values
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {
        "input_ids": torch.full((4, 1), tiny.FIRST_TEXT_ID),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1)[:, -1:],
    }
    # The record is the cache's: a model wrapped anew goes on with it.
    with refusing(monkeypatch, *DECODE) as ran, tokenprune.pruned(model, **cut), torch.no_grad():
        model(**step, past_key_values=cache)
    assert {"_enter", "_enter_layer", "_leave"} <= set(ran)


def test_one_copy_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host `to_host` is the only door; a call goes through it once, a decode step never."""
    from tokenprune.runtime import call as one_call

    calls: list[int] = []
    original = one_call.to_host

    def counted(tensors: Any) -> Any:
        calls.append(len(tensors))
        return original(tensors)

    monkeypatch.setattr(one_call, "to_host", counted)
    model = tiny.qwen2_5_vl()
    with tokenprune.pruned(model, "entropyprune", layer=2, keep=0.5):
        model.generate(**tiny.inputs(model, judge.ROWS, pad="left"), max_new_tokens=4, do_sample=False)
    assert calls == [3]  # ids, mask, grids


@pytest.mark.parametrize("budget", ["energy", "rank", "grey", "floor"])
def test_adaptive_budgets_cost_one_copy_more(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before layer 0, for all pictures of the batch at once; nothing in layers, nothing at decode steps."""
    from tokenprune.runtime import layers

    model = tiny.qwen2_5_vl()
    settings: dict[str, Any] = {"keep": 0.4, "text_floor": 0.6}
    if budget != "floor":
        settings = {"keep": tokenprune.Adaptive(0.4, budget, 0.9)}  # type: ignore[arg-type]
    copies: list[int] = []
    enter, to_list = layers.enter_prompt, torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        copies.append(tensor.numel())
        return to_list(tensor)

    def guarded(*args: Any) -> None:
        with monkeypatch.context() as patch, Refuse():
            patch.setattr(torch.Tensor, "tolist", counted)
            enter(*args)

    monkeypatch.setattr(layers, "enter_prompt", guarded)
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    with refusing(monkeypatch, "_enter_layer", "_enter_attention", "_catch_state") as ran:
        with tokenprune.pruned(model, "entropyprune", layer=2, **settings):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert copies == [2 * 5] and "_enter_layer" in ran  # two numbers of each of five pictures


def test_refuse_can_fail() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Refuse():
        torch.ones(3).sum().item()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_scoring_makes_no_square_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 22: with 1,024 visual tokens nothing the scoring hook makes has n x n elements."""
    model = tiny.llava(side=32, layers=3)
    inputs = tiny.inputs(model, (["text:2", "image", "text:2"],))
    largest = Largest()
    original = Taps._catch_state

    def watched(self: Any, *args: Any) -> Any:
        with largest:
            return original(self, *args)

    monkeypatch.setattr(Taps, "_catch_state", watched)
    with tokenprune.pruned(model, "entropyprune", layer=1, keep=0.5), torch.no_grad():
        model(**inputs)
    assert 0 < largest.elements < 1024 * 1024 // 4
