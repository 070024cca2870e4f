"""Where a search begins: the schedules that a dynamic programme makes of the drift of single cuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import BudgetError, ConfigError, UnsupportedModelError
from tokenprune.methods.vflowopt import VFlowOpt
from tokenprune.space import Point
from tokenprune.tune import stages
from tokenprune.tune.schedule import cells, schedule
from tokenprune.tune.space import Space

#: Prompts that cells are measured on, at most.
PROMPTS = 24
#: Who chooses and reads along a schedule, the first alone measured with single cuts.
READERS: tuple[Mapping[str, Any], ...] = (
    {"recycle_every": True},
    *({f"reads{i}": reader for i in range(1, 1 + stages.LATER)} for reader in ("fastv", "question")),
    {"first": "cdpruner", **{f"reads{i}": "fastv" for i in range(1, 1 + stages.LATER)}},
)


def scheduled(
    space: Space,
    batches: Sequence[Mapping[str, Any]],
    measure: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], NDArray[np.float64]],
) -> tuple[list[Point], int]:
    """Points of a study to begin with, and prefills that finding them cost.

    Every schedule of up to `stages.LATER` later cuts is tried with the first one's map, the last token and the question
    as readers, and behind CDPruner. There are none where stages are not searched, or the budget is no fraction.

    Args:
        space: of the study.
        batches: of prompts; about `PROMPTS` are used.
        measure: drift (samples,) of arguments of `wrap` on batches.
    """
    keep, own = space.keep, space.methods.get(stages.NAME)
    if own is None or not isinstance(keep, float):
        return [], 0
    setting = replace(space.setting, keep=keep)
    default = {name: dimension.default for name, dimension in own.items()}
    chooser: dict[str, Any] = {"method": default["first"]}
    if chooser["method"] == VFlowOpt.name:
        chooser |= VFlowOpt.first_at(default)
        chooser["recycle_every"] = chooser["recycling"] == "hopfield"
    few = batches[: max(1, PROMPTS // len(batches[0]["input_ids"]))]
    found: dict[tuple[int, float], float] = {}
    passes = 0
    for layer, share in cells(setting.num_layers, keep):
        try:
            drift = measure(few, {**chooser, "layer": layer, "keep": share, "budget": "after_cut"})
        except (BudgetError, ConfigError, UnsupportedModelError):  # of pictures too small for so little
            found[layer, share] = math.inf
            continue
        found[layer, share] = float(drift.mean())
        passes += len(drift)
    schedules: list[list[tuple[int, float]]] = []
    for most in range(1, 2 + stages.LATER):
        cuts = schedule(found, setting.num_layers, keep, most)
        if cuts and cuts not in schedules:
            schedules.append(cuts)
    points = [
        space.point(stages.NAME, stages.point_of(cuts, setting, **chosen))
        for cuts in schedules
        for chosen in READERS
    ]
    return list({repr(point): point for point in points}.values()), passes
