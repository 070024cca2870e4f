"""Paired timing: arms run in turn, round after round, so that a change of the machine's load falls on all of them.

And when the first token of an answer is there.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Arm:
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
    arms: dict[str, Arm], rounds: int, *, warmup: int = 2, clock: str = "wall", device: str = "cpu"
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


def _on_clock(now: Callable[[], float], arm: Arm, state: Any) -> tuple[object, float]:
    start = now()
    result = arm.run(state)
    return result, now() - start


def _between_events(arm: Arm, state: Any) -> tuple[object, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = arm.run(state)
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Per-round ratios, summarised."""
    values = [a / b for a, b in zip(numerator, denominator, strict=True)]
    p20, p80 = np.percentile(values, [20, 80])
    return Ratio(statistics.median(values), float(p20), float(p80))


def milliseconds(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


class FirstToken(StoppingCriteria):
    """Notes when the first new token is there; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.at is None:
            self.at = now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds; what was asked of a GPU is done by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
