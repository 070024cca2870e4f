"""A release of transformers that does not exist yet: where what pruning relies on changes, it is refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel

import judge
import tiny
import tokenprune
from tokenprune.releases import cache_argument

CACHE = cache_argument(tiny.llava(layers=1))
LAYER = (LlamaDecoderLayer,)
ALL = (LlavaForConditionalGeneration, LlavaModel, LlamaModel, LlamaDecoderLayer)
CUTS: dict[str, dict[str, Any]] = {
    "before": {"method": "uniform", "layer": 0, "keep": 0.5},
    "at_1": {"method": "entropyprune", "layer": 1, "keep": 0.6},
    "merged": {"method": "vflowopt", "keep": 0.5},
}


def renames(monkeypatch: pytest.MonkeyPatch, kinds: tuple[type[nn.Module], ...], old: str, new: str) -> None:
    """Modules are called with `new` where they were called with `old`; hooks see the new name."""
    for kind in kinds:
        stock: Callable[..., Any] = kind.forward

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return nn.Module.__call__(self, *args, **{new if n == old else n: v for n, v in kwargs.items()})

        @functools.wraps(stock)
        def forward(self: Any, *args: Any, _stock: Any = stock, **kwargs: Any) -> Any:
            return _stock(self, *args, **{old if n == new else n: v for n, v in kwargs.items()})

        monkeypatch.setattr(kind, "__call__", call)
        monkeypatch.setattr(kind, "forward", forward)


class TransposedLayer(DynamicLayer):
    """Holds (B, entries, heads, head_dim)."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_initialized and self.keys.numel():
            self.keys, self.values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        found = super().update(key_states, value_states)
        self.keys, self.values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        return found

    def get_seq_length(self) -> int:
        return self.keys.shape[1] if self.is_initialized and self.keys.numel() else 0


class SlowLayer(DynamicLayer):
    """Says it holds less than it does."""

    def get_seq_length(self) -> int:
        return max(0, super().get_seq_length() - 1)


def cache_of_layers(kind: type[DynamicLayer]) -> DynamicCache:
    cache = DynamicCache()
    cache.layer_class_to_replicate = kind
    return cache


class Pages:
    """A cache without layers."""

    def get_seq_length(self, *_: Any) -> int:
        return 0


def by_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda self, *a, **k: self.forward(*a, **k))


def another_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    stock: Any = LlavaForConditionalGeneration.forward

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, *args, **kwargs)
        output[CACHE] = copy.deepcopy(output[CACHE])
        return output

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)


def states_of_a_fused_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys are computed, but no module is called for them."""
    monkeypatch.setattr(
        nn.Linear, "__call__", lambda self, x: nn.functional.linear(x, self.weight, self.bias)
    )


FUTURES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "cache of layers": (lambda m: renames(m, LAYER, CACHE, "memory"), "hands its decoder layers no 'cache'"),
    "cache everywhere": (lambda m: renames(m, ALL, CACHE, "memory"), "hands its decoder layers no 'cache'"),
    "mask": (lambda m: renames(m, LAYER, "attention_mask", "mask"), "no 'attention_mask'"),
    "rotary": (lambda m: renames(m, LAYER, "position_embeddings", "rope"), "no 'position_embeddings'"),
    "positions": (lambda m: renames(m, LAYER, "position_ids", "positions"), "no 'position_ids'"),
    "by forward": (by_forward, "does not call its decoder layers as modules"),
    "another cache": (another_cache, "returns another cache"),
    "fused": (
        states_of_a_fused_projection,
        "without calling (its|the) (projections|parts)",
    ),
}


@pytest.mark.parametrize("rows", [judge.ROWS[:1], judge.ROWS], ids=["batch1", "ragged4"])
@pytest.mark.parametrize("future", FUTURES)
@pytest.mark.parametrize("cut", CUTS)
def test_a_future_release_is_refused_or_right(
    cut: str, future: str, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = FUTURES[future]
    model = tiny.llava(layers=6)
    inputs = tiny.inputs(model, rows, pad="left")
    stock = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    change(monkeypatch)
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    assert torch.equal(
        model.generate(**inputs, do_sample=False, max_new_tokens=3), stock
    )  # a release that works
    with pytest.warns(tokenprune.UntestedWarning, match=r"5\.99\.0 is newer"):
        tokenprune.wrap(model, **CUTS[cut])
    needs_none = future == "fused" and cut == "before"
    for _ in range(2):  # a refusal is no pass for the next call
        if needs_none:
            break
        with pytest.raises(tokenprune.UnsupportedModelError, match=rf"transformers 5\.99\.0 .*{message}"):
            model.generate(**inputs, do_sample=False, max_new_tokens=3)
        with pytest.raises(tokenprune.UnsupportedModelError, match=r"transformers 5\.99\.0"), torch.no_grad():
            model(**inputs)
    tokenprune.unwrap(model)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=3), stock)


@pytest.mark.parametrize("kind", [TransposedLayer, SlowLayer])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cache_of_another_layout_is_refused(cut: str, kind: Any) -> None:
    model = tiny.llava(layers=6)
    inputs = tiny.inputs(model, judge.ROWS, pad="left")
    with tokenprune.pruned(model, **CUTS[cut]), torch.no_grad():
        for _ in range(2):
            with pytest.raises(tokenprune.UnsupportedModelError, match=r"transformers 5\.\d+\.\d+ "):
                model(**inputs, **{CACHE: cache_of_layers(kind)})
        model(**inputs)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("cache", [Pages(), ((torch.zeros(1), torch.zeros(1)),)], ids=["pages", "tuple"])
def test_what_is_no_cache_is_refused(cut: str, cache: Any) -> None:
    model = tiny.llava(layers=6)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    with tokenprune.pruned(model, **CUTS[cut]), torch.no_grad():
        with pytest.raises(tokenprune.UnsupportedModeError, match="has no layers"):
            model(**inputs, **{CACHE: cache})


def test_something_new_per_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma 3n has it: an input of its own for each layer, which nobody would shorten."""
    model = tiny.llava(layers=6)
    inputs = tiny.inputs(model, judge.ROWS[:1])

    def call(self: nn.Module, hidden: torch.Tensor, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, hidden, per_layer_input=hidden, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", call)
    with tokenprune.pruned(model, **CUTS["at_1"]), torch.no_grad():
        with pytest.raises(
            tokenprune.UnsupportedModelError, match="'per_layer_input', which nobody shortens"
        ):
            model(**inputs)
