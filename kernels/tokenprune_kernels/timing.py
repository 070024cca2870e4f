"""Timing: what is compared takes turns, round after round, so that all of it meets the same changes of the load."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timed:
    """One thing to time.

    Attributes:
        run: what is timed; it gets what `setup` returned.
        setup: runs before the clock starts, every time.
        context: entered around both, outside the clock (wrapping the model, say).
    """

    run: Callable[[Any], object]
    setup: Callable[[], Any] = field(default=lambda: None)
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


@dataclass(frozen=True)
class Ratio:
    """Median and quintiles of the per-round ratios of two arms."""

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.p20:.3f}, {self.p80:.3f}]"


def interleave(
    arms: dict[str, Timed], rounds: int, *, warmup: int = 2, clock: str = "wall", device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each arm, round by round.

    Every second round runs the arms backwards, so that none always follows the same neighbour. The garbage
    collector is off while a clock runs.

    Args:
        arms: by name.
        rounds: measured rounds.
        warmup: rounds before them.
        clock: "wall", or "cpu": processor time of this process, which other processes on the machine do not add to.
        device: on "cuda" the time is that between two events, whatever the clock.
    """
    on_gpu = device.startswith("cuda")
    clocked = _between_events if on_gpu else partial(_on_clock, CLOCKS[clock])
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(-warmup, rounds):
            for name in names if i % 2 == 0 else reversed(names):
                arm = arms[name]
                with arm.context(), torch.inference_mode():
                    state = arm.setup()
                    wait()
                    result, taken = clocked(arm, state)
                del state, result
                if i >= 0:
                    seconds[name].append(taken)
            gc.collect()
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def _on_clock(now: Callable[[], float], arm: Timed, state: Any) -> tuple[object, float]:
    start = now()
    result = arm.run(state)
    return result, now() - start


def _between_events(arm: Timed, state: Any) -> tuple[object, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = arm.run(state)
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Per-round ratios, summarised."""
    values = [a / b for a, b in zip(numerator, denominator, strict=True)]
    ends = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8], dtype=torch.float64))
    return Ratio(statistics.median(values), *ends.tolist())


def milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def interleaved_ms(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Medians of several runs that take turns, in milliseconds of processor time, after one unmeasured turn."""
    arms = {str(i): Timed(lambda _, run=run: run()) for i, run in enumerate(runs)}  # type: ignore[misc]
    return [milliseconds(own) for own in interleave(arms, repeats, warmup=1, clock="cpu").values()]


def cuda_ms(run: Callable[[], object], repeats: int = 50, replays: int = 1) -> float:
    """Median of what a run takes on the GPU, in milliseconds, between events; the L2 cache is flushed before each.

    Args:
        run: what is timed.
        repeats: how often.
        replays: above 1 the run is captured in a graph and replayed so often between two events, its inputs staying
            in the cache: launch costs are then left out.
    """
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    timed = run
    if replays > 1:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(replays):
                run()
        timed = graph.replay
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        timed()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / replays


def copy_bandwidth(gigabytes: float = 2.0) -> float:
    """Bytes read and written by a second of a large copy on the GPU: what a kernel that moves memory is held to."""
    source = torch.randint(-(2**31), 2**31 - 1, (int(gigabytes * 2**28),), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * cuda_ms(lambda: target.copy_(source), repeats=20))
