"""Where a search begins: the schedules that a dynamic programme makes of the drift of single cuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.errors import BudgetError, ConfigError, UnsupportedModelError
from tokenprune.space import OneOf, Point
from tokenprune.tune import stages
from tokenprune.tune.schedule import cells, schedule
from tokenprune.tune.space import Space

#: Prompts that cells are measured on, at most.
PROMPTS = 24
#: Who reads along a schedule: the one that chose first, as with the single cuts, or what the decoder attends to.
READERS = tuple({f"reads{i}": reader for i in range(1, 1 + stages.LATER)} for reader in stages.READERS)


def scheduled(
    space: Space,
    batches: Sequence[Mapping[str, Any]],
    measure: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], NDArray[np.float64]],
) -> tuple[list[Point], int]:
    """Points of a study to begin with, and prefills that finding them cost.

    Who drifts least by one cut before the LLM is taken to choose; its single cuts at several layers and shares are
    measured; the schedules of up to `stages.LATER` later cuts that follow are tried with every reader. There are none
    where stages are not searched, or the budget is no fraction.

    Args:
        space: of the study.
        batches: of prompts; about `PROMPTS` are used.
        measure: drift (samples,) of arguments of `wrap` on batches.
    """
    keep, own = space.keep, space.methods.get(stages.NAME)
    if own is None or not isinstance(keep, float):
        return [], 0
    setting = replace(space.setting, keep=keep)
    few = batches[: max(1, PROMPTS // len(batches[0]["input_ids"]))]
    passes = 0

    def drift(point: Point, layer: int, share: float) -> float:
        nonlocal passes
        method, parameters = stages.chooser_at(point, setting)
        cut = {"method": method, **parameters, "layer": layer, "keep": share, "budget": "after_cut"}
        try:
            found = measure(few, cut)
        except (BudgetError, ConfigError, UnsupportedModelError):  # of pictures too small for so little
            return math.inf
        passes += len(found)
        return float(found.mean())

    default: Point = {name: dimension.default for name, dimension in own.items()} | {"recycle_every": True}
    firsts = own["first"]
    assert isinstance(firsts, OneOf)
    first = min(firsts.values, key=lambda name: drift({**default, "first": name}, 0, keep))
    default["first"] = first
    found = {cell: drift(default, *cell) for cell in cells(setting.num_layers, keep)}
    schedules: list[list[tuple[int, float]]] = []
    for most in range(1, 2 + stages.LATER):
        cuts = schedule(found, setting.num_layers, keep, most)
        if cuts and cuts not in schedules:
            schedules.append(cuts)
    points = [
        space.point(stages.NAME, stages.point_of(cuts, setting, first=first, recycle_every=True, **readers))
        for cuts in schedules
        for readers in READERS
    ]
    return list({repr(point): point for point in points}.values()), passes
