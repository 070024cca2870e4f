"""What pruning adds to a prompt and to a step, counted: Python calls and tensor operations, over the stock model's.

Counts are exact under any load; `tokenprune bench` has the times.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import tokenprune
from tokenprune.api import runtime_of
from tokenprune.releases import cache_argument, cache_of
from tokenprune.runtime import compiled

LAYERS = 32
ROWS = {
    "batch1": [["text:5", "image", "text:7"]],
    "ragged4": [["text:5", "image", "text:7"], *[["text:3", "image", f"text:{n}"] for n in (2, 5, 6)]],
}
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "entropyprune": {"method": "entropyprune", "keep": 0.25, "layer": 2},
    "uniform before": {"method": "uniform", "keep": 0.25, "layer": 0},
    "vflowopt": {"method": "vflowopt", "keep": 0.25},
    "vflowopt no sizes": {"method": "vflowopt", "keep": 0.25, "size_term": False},
}
# Methods whose steps need no mask at batch 1.
PLAIN = {"none", "entropyprune", "uniform before", "vflowopt no sizes"}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Count:
    """Python calls and tensor operations of what `call` does; it is done twice."""

    def __init__(self) -> None:
        self.calls = self.operations = 0

    @contextmanager
    def of_calls(self) -> Iterator[None]:
        def note(frame: FrameType, event: str, arg: Any) -> None:
            self.calls += event == "call"

        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.calls -= 1  # this very end


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava(layers=LAYERS, kv_heads=4)  # stock repeats heads where there is a mask


def counted(model: Any, rows: list[list[str]], method: dict[str, Any] | None) -> tuple[Count, Count]:
    """Of a prompt that is not the first, and of a late step."""
    inputs = tiny.inputs(model, rows, pad="left")
    name, prompt, step = cache_argument(model), Count(), Count()
    context = nullcontext() if method is None else tokenprune.pruned(model, **method)
    with context, torch.no_grad():
        for turn in range(3):
            mode = Operations() if turn == 2 else nullcontext()
            watch = prompt.of_calls() if turn == 1 else nullcontext()
            with watch, mode:
                out = model(**inputs, use_cache=True, logits_to_keep=1)
            if turn == 2:
                prompt.operations = mode.count  # type: ignore[union-attr]
        cache, mask = cache_of(out), inputs["attention_mask"]
        token = torch.full((len(rows), 1), tiny.FIRST_TEXT_ID)
        for n in range(6):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            call = {
                "input_ids": token,
                "attention_mask": mask,
                "position_ids": mask.cumsum(1)[:, -1:] - 1,
                name: cache,
            }
            mode = Operations() if n == 5 else nullcontext()
            watch = step.of_calls() if n == 4 else nullcontext()
            with watch, mode:
                model(**call)
            if n == 5:
                step.operations = mode.count  # type: ignore[union-attr]
        if method is not None:
            runtime = runtime_of(model)
            assert runtime is not None
            hooked = [bool(layer._forward_pre_hooks) for layer in runtime.layers]
            assert all(hooked[1:]) or not any(hooked[1:])
            step.hooked = any(hooked[1:])  # type: ignore[attr-defined]
    return prompt, step


@pytest.fixture(scope="module", autouse=True)
def as_usual() -> Iterator[None]:
    """Nothing is checked twice, and nothing has been compiled, as other tests here may have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TOKENPRUNE_DEBUG", raising=False)
        patch.setattr(compiled, "has_compiled", lambda: False)
        yield


@pytest.fixture(scope="module", params=ROWS)
def stock(model: Any, request: pytest.FixtureRequest) -> tuple[str, tuple[Count, Count]]:
    return request.param, counted(model, ROWS[request.param], None)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_step_and_a_prompt_cost_more(model: Any, stock: Any, method: str) -> None:
    """At 32 layers: a step that needs no mask at most 160 calls and no operation (before the LLM a view of the mask),
    one that does at most 300 and four operations per group of layers that hold the same."""
    rows, (prompt, step) = stock
    own_prompt, own_step = counted(model, ROWS[rows], METHODS[method])
    calls, operations = own_step.calls - step.calls, own_step.operations - step.operations
    plain = method == "none" or (rows == "batch1" and method in PLAIN)
    assert own_step.hooked is not plain  # type: ignore[attr-defined]
    groups = 3 if "vflowopt" in method else 1
    first_is_short = "before" in method or "vflowopt" in method
    assert calls <= (160 if plain else 300)
    assert operations <= (int(first_is_short) if plain else 4 * groups)
    # Prompts: what is chosen and cut, and a hook in each layer.
    assert own_prompt.calls - prompt.calls <= (600 if method == "none" else 3000)
    assert own_prompt.operations - prompt.operations <= (30 if method == "none" else 1000)


def test_hooks_rest_while_nothing_needs_them(model: Any) -> None:
    """A prompt wakes those of the layers; the first step without need of them lets them rest; unwrap leaves none."""
    inputs = tiny.inputs(model, ROWS["batch1"])
    before = [len(layer._forward_pre_hooks) for layer in model.model.language_model.layers]
    with tokenprune.pruned(model, **METHODS["entropyprune"]), torch.no_grad():
        runtime = runtime_of(model)
        assert runtime is not None and not runtime.awake
        out = model(**inputs, use_cache=True)
        assert runtime.awake
        model(input_ids=inputs["input_ids"][:, -1:], **{cache_argument(model): cache_of(out)})
        assert not runtime.awake
        model(input_ids=inputs["input_ids"][:, :3])  # text only
        assert not runtime.awake
        model(**inputs)
        assert runtime.awake
    assert [len(layer._forward_pre_hooks) for layer in model.model.language_model.layers] == before
