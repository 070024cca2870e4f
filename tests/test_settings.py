"""Settings travel with the call: whatever threads, tasks and blocks do, a call is pruned as it was asked."""

from __future__ import annotations

import asyncio
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import judge
import tiny
import tokenprune

TWO: dict[str, Any] = {"method": "random", "keep": 0.5, "layer": 1}


@pytest.fixture
def model() -> Any:
    return tiny.llava(layers=4)


@pytest.fixture
def inputs(model: Any) -> Any:
    return tiny.inputs(model, [["text:3", "image", "text:2", "image", "text:4"]])


def kept(model: Any, inputs: Any) -> float:
    """Tokens the first image keeps after the last cut, of 36 (all of them: nothing was pruned)."""
    with torch.no_grad():
        model(**inputs)
    return tokenprune.report(model).images[0].kept[-1:]


def alone(model: Any, inputs: Any, **arguments: Any) -> float:
    with tokenprune.pruned(model, **arguments):
        return kept(model, inputs)


# -- overlapping and nested blocks -------------------------------------------------------------------------------------


def test_overlapping_overrides_end_in_any_order(model: Any, inputs: Any) -> None:
    few, half, many = (alone(model, inputs, **{**TWO, "keep": k}) for k in (0.3, 0.5, 0.8))
    assert few < half < many
    with tokenprune.pruned(model, **TWO):
        a, b = tokenprune.override(model, keep=0.3), tokenprune.override(model, keep=0.8)
        a.__enter__()
        b.__enter__()
        assert kept(model, inputs) == many
        a.__exit__(None, None, None)
        assert kept(model, inputs) == many
        b.__exit__(None, None, None)
        assert kept(model, inputs) == half


def test_unwrap_and_wrap_inside_an_override(model: Any, inputs: Any) -> None:
    many = alone(model, inputs, **{**TWO, "keep": 0.8})
    with torch.no_grad():
        stock = model(**inputs).logits
    tokenprune.wrap(model, **TWO)
    with tokenprune.override(model, keep=0.3):
        tokenprune.unwrap(model)
        assert not tokenprune.is_wrapped(model)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, stock)
        tokenprune.wrap(model, **{**TWO, "keep": 0.8})
        assert kept(model, inputs) == many  # the override was of what has been unwrapped
    assert kept(model, inputs) == many
    tokenprune.unwrap(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)


# -- threads and tasks -------------------------------------------------------------------------------------------------


def test_tasks_have_their_own_overrides_and_reports(model: Any, inputs: Any) -> None:
    shares = (0.3, 0.5, 0.8)
    wanted = {k: alone(model, inputs, **{**TWO, "keep": k}) for k in shares}

    async def serve(keep: float) -> tuple[float, Any, Any]:
        with tokenprune.override(model, keep=keep):
            await asyncio.sleep(0)
            during = kept(model, inputs)
            await asyncio.sleep(0)
            return keep, during, tokenprune.report(model).images[0].kept[-1:]

    async def all_of_them() -> list[tuple[float, Any, Any]]:
        return await asyncio.gather(*(serve(k) for k in shares for _ in range(3)))

    with tokenprune.pruned(model, **TWO):
        for keep, during, told in asyncio.run(all_of_them()):
            assert during == told == wanted[keep]
        assert kept(model, inputs) == wanted[0.5]


def test_a_thread_started_inside_an_override_takes_it_along_or_warns(model: Any, inputs: Any) -> None:
    wanted = {k: alone(model, inputs, **{**TWO, "keep": k}) for k in (0.3, 0.5)}
    seen: list[Any] = []

    def run() -> None:
        seen.append(kept(model, inputs))

    def in_thread(target: Any) -> None:
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()

    with tokenprune.pruned(model, **TWO):
        with tokenprune.override(model, keep=0.3):
            taken = tokenprune.in_context(run)
            for _ in range(2):
                in_thread(taken)
                assert tokenprune.report(model).images[0].kept[-1:] == wanted[0.3]
            with pytest.warns(tokenprune.OverrideWarning, match="in_context"):
                in_thread(run)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            in_thread(run)
            in_thread(taken)  # what it was made in has ended
    assert seen == [wanted[0.3], wanted[0.3], wanted[0.5], wanted[0.5], wanted[0.5]]


def test_an_override_changes_nothing_in_another_thread_not_even_in_the_middle_of_its_call(
    model: Any, inputs: Any
) -> None:
    half = alone(model, inputs, **TWO)
    inside, go_on = threading.Event(), threading.Event()
    seen: list[Any] = []

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(10)

    handle = model.model.language_model.layers[0].register_forward_hook(wait)
    with tokenprune.pruned(model, **TWO):
        thread = threading.Thread(target=lambda: seen.append(kept(model, inputs)))
        thread.start()
        assert inside.wait(10)
        with tokenprune.override(model, method="entropyprune", keep=0.9, layer=2):
            go_on.set()
            thread.join()
            mine = kept(model, inputs)
            assert tokenprune.report(model).layers_cut == (2,)
    handle.remove()
    assert seen == [half] and mine > half


def test_a_thread_that_has_called_nothing_reads_the_last_report_of_any(model: Any, inputs: Any) -> None:
    """generate() in a thread and a streamer in this one: what people do."""
    with tokenprune.pruned(model, **TWO):
        thread = threading.Thread(target=lambda: kept(model, inputs))
        thread.start()
        thread.join()
        assert tokenprune.report(model).pruned


# -- calls within calls ------------------------------------------------------------------------------------------------


@pytest.fixture
def calling_within(model: Any, inputs: Any) -> Iterator[list[Any]]:
    """A forward hook on the third layer that calls the model, the first time it runs."""
    found: list[Any] = []
    other = tiny.inputs(model, [["text:2", "image", "text:5"]], seed=3)

    def call(*_: Any) -> None:
        if not found:
            found.append(None)
            with tokenprune.override(model, keep=0.8):
                found[0] = (model(**other).logits, tokenprune.report(model).kept)

    handle = model.model.language_model.layers[2].register_forward_hook(call)
    found.append(other)  # nothing is called while the fixture's user prepares
    yield found
    handle.remove()


@pytest.mark.parametrize("strict", [False, True])
def test_a_hook_that_calls_the_model_within_its_own_forward(
    model: Any, inputs: Any, calling_within: list[Any], strict: bool
) -> None:
    with tokenprune.pruned(model, **TWO, strict=strict), torch.no_grad():
        (other,) = calling_within
        alone = model(**inputs).logits
        with tokenprune.override(model, keep=0.8):
            inner = model(**other).logits
            inner_kept = tokenprune.report(model).kept
        calling_within.clear()
        outer = model(**inputs).logits
        ((inner_within, kept_within),) = calling_within
        assert torch.equal(outer, alone) and torch.equal(inner_within, inner)
        assert kept_within == inner_kept
        assert tokenprune.report(model).index.shape[1] == outer.shape[1]


def test_a_call_that_was_interrupted_leaves_nothing_behind(model: Any, inputs: Any) -> None:
    half = alone(model, inputs, **TWO)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with tokenprune.pruned(model, **TWO):
        for module in (
            model.model.vision_tower,
            model.model.language_model,
            *model.model.language_model.layers,
        ):
            handle = module.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                model(**inputs)
            handle.remove()
            assert kept(model, inputs) == half
        with torch.no_grad():  # the inner model, called by itself after an interrupted call
            handle = model.model.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**inputs)
            handle.remove()
            model.model(**inputs)
        assert tokenprune.report(model).images[0].kept[-1:] == half


def test_prefill_is_right_within_another_prefill(model: Any, inputs: Any) -> None:
    """The oracle calls the stock model from inside a wrapped call: both are what they would be alone."""
    differences: list[float] = []

    def judge_another(*_: Any) -> None:
        if not differences:
            differences.append(2.0)
            other = tiny.llava(layers=4)
            differences[0] = judge.prefill_difference(other, tiny.inputs(other, judge.ROWS), **TWO)

    with tokenprune.pruned(model, **TWO), torch.no_grad():
        wanted = model(**inputs).logits
        handle = model.model.language_model.layers[1].register_forward_hook(judge_another)
        assert torch.equal(model(**inputs).logits, wanted)
        handle.remove()
    assert differences[0] <= judge.TOLERANCE


# -- taking it off while it is used ------------------------------------------------------------------------------------


def test_unwrap_waits_for_nobody_it_refuses(model: Any, inputs: Any) -> None:
    half = alone(model, inputs, **TWO)
    refusals: list[str] = []

    def take_off(*_: Any) -> None:
        with pytest.raises(tokenprune.TokenPruneError) as caught:
            tokenprune.unwrap(model)
        refusals.append(str(caught.value))

    tokenprune.wrap(model, **TWO)
    handle = model.model.language_model.layers[1].register_forward_hook(take_off)
    assert kept(model, inputs) == half
    handle.remove()
    with tokenprune.override(model, keep=0.8):
        thread = threading.Thread(target=take_off)
        thread.start()
        thread.join()
    assert "under way" in refusals[0] and "override" in refusals[1]
    tokenprune.unwrap(model)


@pytest.mark.slow
def test_random_interleavings_of_two_threads(model: Any) -> None:
    """1,000 of them: every result is what was asked, or a clear refusal."""
    inputs = tiny.inputs(model, [["text:3", "image", "text:2"]])
    asked = [{**TWO, "keep": k} for k in (0.3, 0.6)] + [{"method": "entropyprune", "keep": 0.7, "layer": 2}]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    known = [logits()]
    for arguments in asked:
        with tokenprune.pruned(model, **arguments):
            known.append(logits())
    failures: list[str] = []
    done = [0, 0]

    def act(thread: int, rng: np.random.Generator, barrier: threading.Barrier) -> None:
        barrier.wait(30)
        choice, which = int(rng.integers(5)), int(rng.integers(len(asked)))
        try:
            if choice == 0:
                tokenprune.wrap(model, **asked[which])
            elif choice == 1:
                tokenprune.unwrap(model)
            elif choice == 2:
                result = logits()
                if not any(torch.equal(result, one) for one in known):
                    failures.append("a call that was none of what could be asked")
            else:
                with tokenprune.override(model, **asked[which]):
                    if not torch.equal(logits(), known[1 + which]):
                        failures.append(f"an override of {asked[which]} that was not heeded")
        except tokenprune.TokenPruneError:
            pass
        done[thread] += 1

    def work(thread: int, barrier: threading.Barrier) -> None:
        rng = np.random.default_rng([thread, 8])
        for _ in range(1000):
            act(thread, rng, barrier)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=work, args=(i, barrier)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(250)
    finally:
        sys.setswitchinterval(switch)
    if tokenprune.is_wrapped(model):
        tokenprune.unwrap(model)
    assert done == [1000, 1000] and not failures, failures[:3]
    assert torch.equal(logits(), known[0])
