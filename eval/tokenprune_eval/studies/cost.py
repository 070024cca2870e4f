"""What a search costs: ``python -m tokenprune_eval.studies.cost``.

One pass is one prompt's decoder prefill, pruned or not. The recipe of VFlowOpt's release (300 trials on 30 samples, the
unpruned reference computed at every trial, a box that is not all feasible, R3 clamped; its optimiser replaced by
Optuna's Gaussian process): 18,000 passes. Against `tokenprune.tune.search`: after how many passes is the drift that the
recipe ends with reached?
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from tokenprune import machine, tables
from tokenprune.analysis.batches import batched
from tokenprune.analysis.memory import Memory
from tokenprune.analysis.plots import new_figure, save_figure
from tokenprune.tune import measure
from tokenprune.tune.search import search
from tokenprune_eval.studies.bench import DRIFT_BATCH, Bench, setting

COLUMNS = ("model", "keep", "arm", "seed", "passes", "seconds", "best_drift", "setting")
Point = tuple[int, float, float, str]  # passes, seconds, best drift so far, its setting


def recipe(bench: Bench, calls: Sequence[Any], keep: float, trials: int, seed: int) -> list[Point]:
    """The release's search, on our runtime; samples as VFlowOpt's paper has them, recycling by cells, no even grid."""
    layers = bench.model.config.text_config.num_hidden_layers
    third = layers // 3
    batches = list(batched(calls, DRIFT_BATCH))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=27))
    points: list[Point] = []
    start, best, named = time.perf_counter(), float("inf"), ""
    for trial in range(1, trials + 1):
        own = study.ask()
        r1 = own.suggest_float("r1", keep, 1.5 * keep)
        r2 = own.suggest_float("r2", 0.8 / 1.5, 1.0)
        shares = (third * r1, third * r1 * r2, (layers - 2 * third) * r1 * r2)
        r3 = min(1.0, max(0.0, (layers * keep - shares[0] - shares[1]) / shares[2]))
        arguments = {
            "method": "vflowopt",
            "recycling": "cells",
            "even": 0.0,
            "size_term": False,
            "t": own.suggest_float("t", 0.0, 50.0),
            "a": own.suggest_float("a", 3.0, 24.0),
            "alpha": own.suggest_float("alpha", -1.0, 1.0),
            "cuts": [(0, r1), (third, r1 * r2), (2 * third, max(1e-3, r1 * r2 * r3))],
        }
        drift = float(measure(bench.model, batches, arguments, Memory()).mean())  # nothing is remembered
        study.tell(own, drift)
        if drift < best:
            best, named = drift, setting(arguments)
        points.append((2 * len(calls) * trial, time.perf_counter() - start, best, named))
    return points


def ours(
    bench: Bench, calls: Sequence[Any], keep: float, trials: int, seed: int, more: Mapping[str, Any]
) -> list[Point]:
    """`search` as it is, with a memory of its own."""
    start, seconds = time.perf_counter(), []

    def told(_: Any) -> None:
        seconds.append(time.perf_counter() - start)

    found = search(bench.model, calls, keep, trials=trials, seed=seed, told=told, **more)
    passes = 2 * len(calls) + np.cumsum(
        [len(one.drift) for one in found.tried]
    )  # references, and the space's look
    points: list[Point] = []
    best, named = float("inf"), ""
    for one, cost, at in zip(found.tried, passes, seconds[-len(found.tried) :], strict=True):
        if len(one.drift) == len(calls) and one.value < best:
            best, named = one.value, setting(one.arguments)
        points.append((int(cost), at, best, named))
    return points


def main(argv: Sequence[str] | None = None) -> None:
    """Run both, write the curves, and say what was reached when."""
    parser = argparse.ArgumentParser(description="Passes that a search needs.")
    parser.add_argument("--model", default="small")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--trials", type=int, default=300, help="of the release's recipe")
    parser.add_argument("--our-trials", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="of ours")
    parser.add_argument("--csv", type=Path, default=Path("eval/results/cost_small.csv"))
    options = parser.parse_args(argv)
    bench = Bench(options.model, 100)
    calls = bench.calibration(options.samples, 0)
    curves = {("recipe", 0): recipe(bench, calls, options.keep, options.trials, 0)}
    final = curves["recipe", 0][-1]
    print(f"recipe: {final[2]:.4g} after {final[0]} passes, {final[1]:.0f} s", flush=True)
    for seed in range(options.seeds):
        for arm, more in (("ours", {}), ("ours, vflowopt", {"methods": ["vflowopt"]})):
            curve = curves[arm, seed] = ours(bench, calls, options.keep, options.our_trials, seed, more)
            reached = next((p for p in curve if p[2] <= final[2]), None)
            said = (
                "not reached" if reached is None else f"reached after {reached[0]} passes, {reached[1]:.1f} s"
            )
            print(f"{arm}, seed {seed}: {said}; {curve[-1][2]:.4g} after {curve[-1][0]} passes", flush=True)
    write(options.csv, options.model, options.keep, curves)
    draw(options.csv.with_suffix(".png"), curves)


def write(path: Path, model: str, keep: float, curves: Mapping[tuple[str, int], Sequence[Point]]) -> None:
    """Every improvement of every curve, and its end."""
    described, rows = machine.describe(), []
    for (arm, seed), curve in curves.items():
        before = float("inf")
        for passes, seconds, best, named in curve:
            if best < before or passes == curve[-1][0]:
                values = (model, keep, arm, seed, passes, f"{seconds:.2f}", f"{best:.6g}", named)
                rows.append(dict(zip(COLUMNS, map(str, values), strict=True)) | described)
            before = best
    tables.write(path, rows)


def draw(path: Path, curves: Mapping[tuple[str, int], Sequence[Point]]) -> None:
    """Best drift so far against passes, and against seconds."""
    figure = new_figure(2)
    for axes, index, label in zip(figure.axes, (0, 1), ("prefills of a prompt", "seconds"), strict=True):
        for (arm, seed), curve in curves.items():
            colour = {"recipe": "tab:red", "ours": "tab:blue"}.get(arm, "tab:green")
            x, y = [p[index] for p in curve], [p[2] for p in curve]
            axes.step(x, y, where="post", color=colour, linewidth=1, label=arm if seed == 0 else None)
        axes.set(xlabel=label, ylabel="least drift so far", xscale="log", yscale="log")
        axes.legend(fontsize=7)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
