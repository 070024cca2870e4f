"""A minute of tuning: which method and form drifts least on a few unlabelled pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.analysis.memory import Memory, content_digest
from tokenprune.api import family_of
from tokenprune.budget import Keep
from tokenprune.errors import BudgetError, ConfigError, UnsupportedModelError
from tokenprune.profiles.profile import Profile
from tokenprune.tune.controls import CONTROLS
from tokenprune.tune.drift import measure
from tokenprune.tune.making import make_profile

ROUNDS = (4, 8, 16)  # samples; after each round the better half goes on


@dataclass
class Trial:
    """A setting and its drift.

    Attributes:
        arguments: of `wrap`, without the budget.
        drift: of the samples measured so far.
        failed: why it could not be measured.
    """

    arguments: dict[str, Any]
    drift: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    failed: str | None = None

    @property
    def mean(self) -> float:
        return float(self.drift.mean()) if len(self.drift) else float("inf")

    def name(self) -> str:
        own = ", ".join(f"{k}={v}" for k, v in self.arguments.items() if k != "method")
        return f"{self.arguments['method']} ({own})" if own else str(self.arguments["method"])


_FORMS = (("recycling", "none"), ("t", 1.5), ("t", 5.0), ("size_term", False), ("voters", "cls"))


def candidates(num_layers: int) -> list[dict[str, Any]]:
    """The forms that are tried: every source of EntropyPrune, VFlowOpt's cells and voters, FastV, and the controls."""
    early = max(1, round(num_layers / 16))
    layers = sorted({early, min(2, num_layers - 1)})
    found: list[dict[str, Any]] = [{"method": "uniform", "layer": 0}, {"method": "random", "layer": 0}]
    found += [{"method": "vflowopt", "even": even} for even in (0.0, 0.3, 0.5, 0.7)]
    found += [
        {"method": "vflowopt", "recycling": "cells", "a": a, "even": 0.0, "size_term": False}
        for a in (2.0, 3.0, 4.0, 6.0)
    ]
    found += [{"method": "vflowopt", name: value} for name, value in _FORMS]
    for layer in layers:
        found += [{"method": "uniform", "layer": layer}, {"method": "fastv", "layer": layer}]
        found += [
            {"method": "entropyprune", "layer": layer, "source": source, "normalization": normalization}
            for source in ("query", "key", "value", "hidden")
            for normalization in ("none", "trace")
        ]
    return found


def quick(
    model: Any,
    calls: Sequence[Mapping[str, Any]],
    keep: Keep,
    *,
    metric: str = "cosine",
    told: Callable[[Trial, int, int], None] | None = None,
) -> tuple[Profile, list[Trial]]:
    """Choose by drift among the forms of the methods at hand, by successive halving.

    Args:
        model: stock, not wrapped.
        calls: its inputs for at least 4 prompts; 16 are used.
        keep: the budget, an average over layers.
        metric: see `METRICS`.
        told: called after every measurement with how many there were, and about how many there will be.

    Returns:
        A sealed profile of the best, and all trials, the best first. Controls are measured on all samples.

    Raises:
        ConfigError: too few samples, or a budget that nothing can meet.
    """
    calls = list(calls)[: ROUNDS[-1]]
    if len(calls) < ROUNDS[0]:
        raise ConfigError(f"at least {ROUNDS[0]} samples are needed to choose by drift, not {len(calls)}")
    memory = Memory()
    trials = [Trial(arguments) for arguments in candidates(len(family_of(model).layers()))]
    running, done = trials, 0
    expected = sum(len(trials) // 2**i for i in range(len(ROUNDS)))
    for samples in ROUNDS:
        for trial in running:
            more = calls[len(trial.drift) : samples]
            if not more:
                continue
            try:
                new = measure(model, more, {**trial.arguments, "keep": keep}, memory, metric)
            except (BudgetError, ConfigError, UnsupportedModelError) as error:
                trial.failed = str(error)
                continue
            trial.drift = np.concatenate([trial.drift, new])
            if told is not None:
                done += 1
                told(trial, done, max(done, expected))
        running = sorted((t for t in running if t.failed is None), key=lambda t: t.mean)
        if not running:
            raise ConfigError(f"keep={keep} cannot be met by any method here: {trials[0].failed}")
        best, rest = running[: max(4, len(running) // 2)], running[max(4, len(running) // 2) :]
        running = [*best, *(t for t in rest if t.arguments["method"] in CONTROLS)]
    ranked = sorted(trials, key=lambda t: (-len(t.drift), t.mean))
    return _profile(model, calls, keep, metric, ranked), ranked


def _profile(
    model: Any, calls: Sequence[Mapping[str, Any]], keep: Keep, metric: str, ranked: list[Trial]
) -> Profile:
    best = ranked[0]
    controls = {
        name: min(t.mean for t in ranked if t.arguments["method"] == name and t.failed is None)
        for name in CONTROLS
    }
    made = {
        "how": "tokenprune tune --quick",
        "data": content_digest(*(dict(inputs) for inputs in calls)),
        "samples": len(calls),
        "sampler": "successive halving",
        "trials": sum(t.failed is None for t in ranked),
    }
    return make_profile(
        model, {**best.arguments, "keep": keep}, best.drift, metric=metric, controls=controls, made=made
    )
