"""Ctrl-C at any point: the next call is right, and nothing is left behind (contract 13).

A KeyboardInterrupt may come before any line of Python; no hook of a module runs after it. A trace function raises it
here at chosen calls and lines.
"""

from __future__ import annotations

import gc
import linecache
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import judge
import tiny
import tokenprune
from test_wrapping import installed
from tokenprune.api import _WRAPPING, runtime_of
from tokenprune.models import find_family
from tokenprune.releases import cache_argument, cache_of
from tokenprune.runtime.current import _OVERRIDES

Wanted = Callable[[FrameType], bool]


class Interrupt:
    """Inside, a KeyboardInterrupt comes at the n-th event of some frames; where there are fewer, none."""

    def __init__(self, n: int, kind: str, wanted: Wanted) -> None:
        self.n, self.kind, self.wanted, self.seen = n, kind, wanted, 0

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == self.kind and self.wanted(frame) and not _gives_a_lock_back(frame):
            self.seen += 1
            if self.seen == self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace if self.kind == "line" and self.wanted(frame) else None


def _gives_a_lock_back(frame: FrameType) -> bool:
    """A `with` on a lock is traced at its end, too, where Python itself lets no signal in before the lock is free."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return line.startswith("with ") and line.endswith(("gate:", "_WRAPPING:"))


def locks_are_free(model: Any) -> bool:
    """Another thread's wrap, unwrap, override and calls would not wait for this one."""
    runtime = runtime_of(model)
    locks = [_WRAPPING] if runtime is None else [_WRAPPING, runtime.gate]
    taken: list[bool] = []

    def take() -> None:
        for lock in locks:
            taken.append(lock.acquire(timeout=1))
            if taken[-1]:
                lock.release()

    other = threading.Thread(target=take)
    other.start()
    other.join()
    return all(taken)


def of_generate(frame: FrameType) -> bool:
    """Where the library, the stock model and torch's modules run."""
    return any(part in frame.f_code.co_filename for part in ("tokenprune", "transformers", "torch/nn"))


def ours(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return ("/tokenprune/" in name and "/tests/" not in name) or "torch/nn/modules/module.py" in name


GREEDY = {"do_sample": False, "max_new_tokens": 3}
# (family, settings that are interrupted, settings of the next call, options of generate, points)
RUNS: dict[str, Any] = {
    "tower": ("llava", {"method": "importance", "layer": 2}, {"method": "importance", "t": 1.0}, {}, 50),
    "merging": ("qwen2_5_vl", {"method": "vflowopt"}, {"method": "entropyprune", "layer": 2}, {}, 50),
    "other": ("llava_next", {"method": "entropyprune", "layer": 2}, {"method": "vflowopt"}, {}, 25),
    "static": ("llava", {"method": "vflowopt"}, {"keep": 0.3}, {"cache_implementation": "static"}, 25),
}


@pytest.mark.parametrize("run", RUNS)
def test_generate_interrupted_anywhere(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python swallows an interrupt inside a generator's end, and pytest would keep its traceback, frames and all.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    family, first, then, options, points = RUNS[run]
    before = {id(callback) for callback in gc.callbacks}  # of threads that other tests have left behind
    model, options = tiny.build(family, layers=3), {**GREEDY, **options}
    inputs = tiny.inputs(model, [["text:5", "image", "text:3"], ["text:2", "image", "image", "text:4"]])

    def answer() -> tuple[Any, Any]:
        out = model.generate(**inputs, **options)
        return out.tolist(), tokenprune.report(model).keep_lists

    caches: list[weakref.ref[Any]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        caches.append(weakref.ref(cache_of(kwargs)))

    with tokenprune.pruned(model, **{"keep": 0.5, "budget": "after_cut", **first}):
        with tokenprune.override(model, **{"keep": 0.5, "budget": "after_cut", **then}):
            wanted = answer()
        with Interrupt(0, "call", of_generate) as count:
            answer()
    total, interrupted = count.seen, 0
    assert total > 3 * points
    layer = find_family(model).layers()[0]
    layer.register_forward_pre_hook(note, with_kwargs=True)
    tokenprune.wrap(model, **{"keep": 0.5, "budget": "after_cut", **first})
    for point in range(points):
        caches.clear()
        try:
            with Interrupt(1 + point * total // points, "call", of_generate):
                answer()
        except KeyboardInterrupt:
            interrupted += 1
        gc.collect()
        assert [ref() for ref in caches if ref() is not None] == []
        with tokenprune.override(model, **{"keep": 0.5, "budget": "after_cut", **then}):
            assert answer() == wanted
    assert interrupted > 0.75 * points  # a few fall into callbacks that swallow it, or behind a shorter call
    tokenprune.unwrap(model)
    left = [callback for callback in gc.callbacks if "tokenprune" in type(callback).__module__]
    assert [callback for callback in left if id(callback) not in before] == []


METHODS: tuple[dict[str, Any], ...] = (
    *({"method": "vflowopt"}, {"method": "importance", "layer": 1}, {"method": "fastv", "layer": 1}),
    *(
        {"method": "entropyprune", "layer": 1},
        {"method": "random", "layer": 0},
        {"method": "uniform", "layer": 0},
    ),
)


def held(model: Any) -> dict[str, Any]:
    """What may hang on a model and on this thread."""
    return {
        **installed(model),
        "callbacks": [own for own in gc.callbacks if "tokenprune" in type(own).__module__],
        "overrides": [own for own in _OVERRIDES.get() if own() is not None],
    }


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in tiny.VARIANTS])
def test_nothing_is_left_of_any_method(family: str) -> None:
    """After calls, overrides, calls that fail and calls that are interrupted: no hook, attribute or callback."""
    model = tiny.build(family, layers=3)
    rows = [["image", "text:4"]] if family == "paligemma" else judge.ROWS[:1]
    inputs = tiny.inputs(model, rows)
    stock = model.generate(**inputs, **GREEDY)  # transformers puts hooks of its own into the tower
    before = held(model)
    layers, tower = find_family(model).layers(), find_family(model).vision_tower()

    def boom(*_: Any) -> None:
        raise error

    first = find_family(model).attending()[0]
    for asked in METHODS:
        arguments = {**asked, "layer": asked["layer"] + first} if asked.get("layer") else asked
        if family == "kimi_k25" and asked["method"] in ("fastv", "entropyprune"):
            continue  # its latent attention's states are not offered
        tokenprune.wrap(model, **{"keep": 0.7, "budget": "after_cut", **arguments})
        model.generate(**inputs, **GREEDY)
        with tokenprune.override(model, method="vflowopt", layer=1, keep=0.5, budget="after_cut"):
            model.generate(**inputs, **GREEDY)
        for module in (layers[1], tower):
            for error in (ValueError, KeyboardInterrupt):
                handle = module.register_forward_pre_hook(boom)
                with pytest.raises(error):
                    model.generate(**inputs, **GREEDY)
                handle.remove()
        gc.collect()
        runtime = runtime_of(model)
        assert runtime is not None and not runtime.calls.stack and runtime.calls.tower is None
        tokenprune.unwrap(model)
        assert held(model) == before
    assert torch.equal(model.generate(**inputs, **GREEDY), stock)


@pytest.mark.parametrize("cut", [{"layer": 0}, {"layer": 2}])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_a_cache_that_was_interrupted_is_refused_or_right(cut: Any, static: bool) -> None:
    """The caller's own cache, half filled: a further call is refused, or it is what it would have been."""
    model = tiny.llava(layers=3)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    length = inputs["input_ids"].shape[1]
    token = torch.full((1, 1), 50)
    step = {
        "input_ids": token,
        "attention_mask": torch.ones(1, length + 1, dtype=torch.long),
        "position_ids": torch.tensor([[length]]),
    }
    config = model.config.text_config

    def cache() -> Any:
        return StaticCache(config=config, max_cache_len=128) if static else DynamicCache(config=config)

    refused = 0
    with tokenprune.pruned(model, "random", keep=0.5, budget="after_cut", **cut), torch.no_grad():
        whole = cache()
        model(**inputs, **{cache_argument(model): whole})
        wanted = model(**step, **{cache_argument(model): whole}).logits
        with Interrupt(0, "call", of_generate) as count:
            model(**inputs, **{cache_argument(model): cache()})
        for point in range(60):
            own = cache()
            try:
                with Interrupt(1 + point * count.seen // 60, "call", of_generate):
                    model(**inputs, **{cache_argument(model): own})
                done = True
            except KeyboardInterrupt:
                done = False
            empty = not any(getattr(layer, "is_initialized", False) for layer in own.layers)
            try:
                found = model(**step, **{cache_argument(model): own}).logits
                assert empty or torch.equal(found, wanted)
            except tokenprune.UnsupportedModeError:
                assert not done
                refused += 1
    assert refused > 10


def test_wrap_interrupted_anywhere() -> None:
    model = tiny.llava_next(layers=2)
    arguments: dict[str, Any] = {"method": "vflowopt", "keep": 0.5}
    before = installed(model)
    for _ in range(2):  # the first time, there is more to import
        with Interrupt(0, "line", ours) as count:
            tokenprune.wrap(model, **arguments)
        tokenprune.unwrap(model)
    # The last lines all: the model is wrapped there already.
    points = sorted(
        {1 + i * count.seen // 250 for i in range(250)} | set(range(count.seen - 15, count.seen + 1))
    )
    for point in points:
        with pytest.raises(KeyboardInterrupt), Interrupt(point, "line", ours):
            tokenprune.wrap(model, **arguments)
        assert installed(model) == before and locks_are_free(model)
    tokenprune.wrap(model, **arguments)
    tokenprune.unwrap(model)
    assert installed(model) == before


def test_unwrap_interrupted_anywhere_can_be_repeated() -> None:
    model = tiny.llava_next(layers=2)
    before = installed(model)
    tokenprune.wrap(model, "vflowopt", keep=0.5)
    with Interrupt(0, "line", ours) as count:
        tokenprune.unwrap(model)
    for i in range(60):
        tokenprune.wrap(model, "vflowopt", keep=0.5)
        try:
            with Interrupt(1 + i * count.seen // 60, "line", ours):
                tokenprune.unwrap(model)
        except KeyboardInterrupt:
            assert locks_are_free(model)
            if tokenprune.is_wrapped(model):
                tokenprune.unwrap(model)
        assert installed(model) == before


def test_override_interrupted_anywhere() -> None:
    """At any line of its beginning and its end: it is not in force afterwards, and the model can be unwrapped."""
    model = tiny.llava(layers=3)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    tokenprune.wrap(model, "random", layer=1, keep=0.6)

    def kept() -> Any:
        with torch.no_grad():
            model(**inputs)
        return tokenprune.report(model).keep_lists

    wanted = kept()
    with Interrupt(0, "line", ours) as count, tokenprune.override(model, method="vflowopt", keep=0.5):
        pass
    for point in sorted({1 + i * count.seen // 200 for i in range(200)}):
        try:
            with Interrupt(point, "line", ours):
                with tokenprune.override(model, method="vflowopt", keep=0.5):
                    pass
        except KeyboardInterrupt:
            pass
        assert kept() == wanted and locks_are_free(model)
        tokenprune.unwrap(model)
        tokenprune.wrap(model, "random", layer=1, keep=0.6)


def test_an_override_ends_with_what_holds_it() -> None:
    model = tiny.llava(layers=2)
    with tokenprune.pruned(model, "random", layer=1, keep=0.6):
        block = tokenprune.override(model, keep=0.55)
        block.__enter__()
        runtime = runtime_of(model)
        assert runtime is not None and runtime.settings is not runtime.config
        del block
        gc.collect()
        assert runtime.settings is runtime.config


def test_interrupts_of_other_threads_do_not_matter() -> None:
    """A thread's calls under way are its own: a garbage collection in another one leaves them alone."""
    model = tiny.llava(layers=3)
    inputs = tiny.inputs(model, judge.ROWS[:1])
    with tokenprune.pruned(model, "random", layer=1, keep=0.6):

        def collect(*_: Any) -> None:
            gc.collect()

        other = threading.Thread(target=lambda: [gc.collect() for _ in range(20)])
        model.model.language_model.layers[1].register_forward_pre_hook(collect)
        other.start()
        for _ in range(5):
            model.generate(**inputs, **GREEDY)
            assert tokenprune.report(model).pruned
        other.join()
