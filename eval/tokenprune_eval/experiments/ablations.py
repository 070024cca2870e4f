"""VFlowOpt, part by part, on a testbed: ``python -m tokenprune_eval.experiments ablations``.

Each row changes one thing of the default. Drift on held-out prompts, accuracy on held-out questions.
"""

from __future__ import annotations

from typing import Any

from tokenprune_eval.experiments.base import Experiment
from tokenprune_eval.experiments.bench import Bench

PAPER = {"recycling": "cells", "even": 0.0, "a": 3.0, "size_term": False}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "as in the paper: cells, no even grid": PAPER,
    "the same without recycling": {**PAPER, "recycling": "none"},
    "without recycling": {"recycling": "none"},
    "without the size term": {"size_term": False},
    "cells": {"recycling": "cells", "a": 3.0},
    "no even grid": {"even": 0.0},
    "nothing but the even grid, retrieval and size term": {"even": 1.0},
    "voters: t = 1.5": {"t": 1.5},
    "voters: t = 3": {"t": 3.0},
    "voters: CLS": {"voters": "cls"},
    "entropy: alpha = 0.2": {"alpha": 0.2},
    "entropy: alpha = -0.2": {"alpha": -0.2},
    "recycled tokens protected (cells)": {**PAPER, "protect_recycled": True},
    "size term (cells)": {**PAPER, "size_term": True},
    "softer retrieval: beta = 10": {"beta": 10.0},
    "one cut, before the LLM": {"layer": 0},
    "one cut, positions counted anew": {"layer": 0, "positions": "compact"},
    "steeper: r1 = 1.6 budgets, r2 = 0.6": {"r1": 1.6, "r2": 0.6},
    "uniform, before the LLM": {"method": "uniform", "layer": 0},
    "random, before the LLM": {"method": "random", "layer": 0},
}


def arms(bench: Bench, keep: float | None) -> dict[str, dict[str, Any]]:
    """Arguments of `wrap` by what is changed."""
    if keep is None:
        return {}
    found = {name: {"method": "vflowopt", "keep": keep, **own} for name, own in ARMS.items()}
    for own in found.values():
        if "r1" in own:
            own["r1"] = min(1.0, own["r1"] * keep)
    return found


EXPERIMENT = Experiment(
    "ablations",
    "What each part of VFlowOpt is worth.",
    arms,
    models=("small",),
    budgets=(0.22,),
    prompts=200,
)
