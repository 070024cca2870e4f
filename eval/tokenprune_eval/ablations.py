"""VFlowOpt, part by part, on a testbed: ``python -m tokenprune_eval.ablations``.

Each row changes one thing of the default. Drift on held-out prompts, accuracy on held-out questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenprune_eval.results import Results
from tokenprune_eval.settings import ROW, Bench

COLUMNS = ["key", "model", "keep", "changed", *ROW]
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the CSV yet."""
    parser = argparse.ArgumentParser(description="VFlowOpt without each of its parts.")
    parser.add_argument("--model", default="small")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.22])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--csv", type=Path, default=Path("eval/results/ablations.csv"))
    options = parser.parse_args(argv)
    results = Results(options.csv, COLUMNS)
    results.load()
    bench = Bench(options.model, options.questions, prompts=200)
    for keep in options.budgets:
        for changed, own in ARMS.items():
            key = f"{options.model} {keep} {changed}"
            if key in results.rows:
                continue
            arguments = {"method": "vflowopt", "keep": keep, **own}
            if "r1" in own:
                arguments["r1"] = min(1.0, own["r1"] * keep)
            row = bench.row(arguments)
            results.add({"key": key, "model": options.model, "keep": str(keep), "changed": changed, **row})
            print(f"{key}: drift {row['held_out_drift']}, accuracy {float(row['accuracy']):.1%}", flush=True)


if __name__ == "__main__":
    main()
