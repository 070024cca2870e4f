"""The search space of stages: who chooses first, where it is cut again, what is kept there, and who reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenprune.methods.staged import Staged
from tokenprune.methods.vflowopt import VFlowOpt
from tokenprune.space import Dimension, OneOf, Point, Real, Setting, Whole, spend, spent_ratios

NAME = Staged.name
#: Later cuts at most: what three did not bring, more did not on either testbed.
LATER = 3
#: Who may choose before the LLM, by name: VFlowOpt, or another in a `Merge`.
FIRST = (VFlowOpt.name, "cdpruner", "divprune")
#: Who may read later: the one that chose first, or the last token, or all of the question.
READERS = ("map", "fastv", "question")


def search_space(setting: Setting) -> Mapping[str, Dimension] | None:
    """What may be varied; None in a model of fewer than three layers, which is cut before the LLM alone."""
    layers = setting.num_layers
    if layers < 3:
        return None
    own = VFlowOpt.first_space(setting)
    space: dict[str, Dimension] = {"first": OneOf(FIRST if own is not None else FIRST[1:])}
    if own is not None:
        space |= {**own, "recycle_every": OneOf((False, True))}
    space["cuts"] = Whole(1, 1 + LATER, 3)
    defaults = (layers // 3, 2 * layers // 3, 5 * layers // 6)
    first = spent_ratios((0, layers // 3), (1.2,), setting)[0]
    for i, layer in enumerate(defaults, 1):
        space[f"layer{i}"] = Whole(1, layers - 1, max(1, layer))
        space[f"kept{i}"] = Real(0.0, 1.0, first if i == 1 else 0.5)
        if setting.scored:
            space[f"reads{i}"] = OneOf(READERS if own is not None else READERS[1:])
    return space


def arguments_at(point: Point, setting: Setting) -> dict[str, Any]:
    """A point as arguments of `wrap`; every one meets the budget. "kept1" is what the first cut keeps, and so on."""
    layers = [0, *sorted({int(point[f"layer{i}"]) for i in range(1, int(point["cuts"]))})]
    ratios = [float(point[f"kept{i}"]) for i in range(1, len(layers))]
    cuts = spend(layers, ratios, setting)
    first, own = chooser_at(point, setting)
    readers = [str(point.get(f"reads{i}", "map")) for i in range(1, len(layers))]
    if first == VFlowOpt.name and set(readers) <= {"map"}:
        return {"method": first, "cuts": cuts, **own}
    stages = [(0, first, cuts[0][1], own)]
    for (layer, keep), reader in zip(cuts[1:], readers, strict=True):
        name, parameters = (first, own) if reader == "map" else (reader, {})
        stages.append((layer, name, keep, parameters))
    return {"method": "auto", "stages": stages}


def chooser_at(point: Point, setting: Setting) -> tuple[str, dict[str, Any]]:
    """Who chooses first, and its parameters."""
    first = str(point["first"])
    if first != VFlowOpt.name:
        return ("merge", {"of": first}) if setting.biases else (first, {})
    own = VFlowOpt.first_at(point)
    own["recycle_every"] = bool(point["recycle_every"]) and own["recycling"] == "hopfield"
    return first, own


def point_of(cuts: Sequence[tuple[int, float]], setting: Setting, **chosen: Any) -> Point:
    """The point that cuts at these layers, the first before the LLM, and keeps these shares but at the last.

    Args:
        cuts: at most 1 + `LATER` of them.
        setting: of the space.
        **chosen: other dimensions; those not named are the defaults.
    """
    space = search_space(setting)
    assert space is not None
    layers = [layer for layer, _ in cuts]
    ratios = spent_ratios(layers, [share / setting.keep for _, share in cuts], setting)
    point: Point = {name: dimension.default for name, dimension in space.items()}
    point["cuts"] = len(cuts)
    for i, (layer, ratio) in enumerate(zip(layers[1:], ratios, strict=True), 1):
        point |= {f"layer{i}": layer, f"kept{i}": ratio}
    return point | {name: value for name, value in chosen.items() if name in space}
