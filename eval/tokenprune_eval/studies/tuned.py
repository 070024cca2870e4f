"""Is a tuned profile better on scenes it has not seen? ``python -m tokenprune_eval.studies.tuned``.

For every seed and budget: VFlowOpt untuned; the best schedule that the search begins with; the best of TPE behind it;
and what random sampling of the same space finds in as many prefills, without schedules to begin with.
Drift on the samples searched on and on held-out prompts, accuracy on held-out questions. Then settings that were
tried, spread over their ranks, with drift and accuracy: whether one follows the other (Spearman).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tokenprune.tune.search import Tried, search
from tokenprune_eval.studies.bench import ROW, Bench
from tokenprune_eval.studies.rows import Rows

COLUMNS = ["key", "model", "keep", "seed", "arm", "samples", "passes", "drift", *ROW]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the CSV yet, and print what is."""
    parser = argparse.ArgumentParser(description="Tuned profiles on scenes they have not seen.")
    parser.add_argument("--model", default="small")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.11])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=96, help="that are searched on")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--spread", type=int, default=12, help="settings for the rank correlation; 0: none")
    parser.add_argument("--csv", type=Path, help="(default: eval/results/tuned_MODEL.csv)")
    options = parser.parse_args(argv)
    bench = Bench(options.model, options.questions)
    results = Rows(options.csv or Path(f"eval/results/tuned_{bench.name}.csv"), COLUMNS)
    results.load()
    for keep in options.budgets:
        for seed in range(options.seeds):
            compare(bench, results, keep, seed, options.samples, options.trials, options.spread)
    summarise(results)


def compare(
    bench: Bench, results: Rows, keep: float, seed: int, samples: int, trials: int, spread: int
) -> None:
    """The rows of one budget and seed; the settings that are spread over ranks with the first seed only."""
    place = f"{bench.name} {keep} {seed}"
    drawn = bench.calibration(samples + samples // 2, seed)
    calls, fresh = drawn[:samples], drawn[samples:]

    def add(arm: str, one: Tried, passes: int) -> None:
        print(f"{place} {arm}: {one.value:.4g}", flush=True)
        results.add(
            {
                "key": f"{place} {arm}",
                "model": bench.name,
                "keep": str(keep),
                "seed": str(seed),
                "arm": arm,
                "samples": str(samples),
                "passes": str(passes),
                "drift": f"{one.value:.6g}",
                **bench.row(one.arguments),
            }
        )

    given: dict[str, Any] = {"methods": ["stages"], "seed": seed, "memory": bench.memory}
    if f"{place} tuned" not in results.rows:
        found = search(bench.model, calls, keep, fresh=fresh, trials=trials, **given)
        add("untuned", found.tried[0], 2 * samples)
        begun = found.study.user_attrs["begun"]
        scheduled = [
            t for t in found.tried if 0 < t.number < len(begun["points"]) and len(t.drift) == samples
        ]
        if scheduled:
            add("schedule", min(scheduled, key=lambda one: one.value), begun["passes"])
        if seed == 0 and spread:
            whole = sorted((t for t in found.tried if len(t.drift) == samples), key=lambda one: one.value)
            given_to_random = {**given, "sampler": "random", "schedule": False, "stop_early": False}
            more = search(bench.model, calls, keep, trials=spread, **given_to_random)
            picked = sorted([*whole[:: max(1, len(whole) // 8)], *more.tried], key=lambda one: one.value)
            for number, one in enumerate(picked):
                add(f"tried {number}", one, 0)
        add("tuned", found.front[0], found.passes)
    if f"{place} random search" not in results.rows:
        passes = int(results.rows[f"{place} tuned"]["passes"])
        of_random = {**given, "sampler": "random", "schedule": False, "trials": passes, "passes": passes}
        found = search(bench.model, calls, keep, fresh=fresh, **of_random)
        add("random search", found.front[0], found.passes)


def summarise(results: Rows) -> None:
    """Medians and ranges over seeds, and the rank correlation."""
    rows = list(results.rows.values())
    for keep in sorted({row["keep"] for row in rows}, reverse=True):
        own = [row for row in rows if row["keep"] == keep]
        print(f"\naverage retention {float(keep):.0%}")
        for arm in ("untuned", "schedule", "random search", "tuned"):
            same = [row for row in own if row["arm"] == arm]
            if not same:
                continue
            for what in ("drift", "held_out_drift", "accuracy", "passes"):
                values = [float(row[what]) for row in same]
                print(
                    f"  {arm:<14}{what:<15}{np.median(values):>9.4g} [{min(values):.4g}, {max(values):.4g}] "
                    f"of {len(values)}"
                )
        tried = [row for row in own if row["arm"].startswith("tried")]
        pairs = [(float(row["held_out_drift"]), float(row["accuracy"])) for row in tried]
        if len(pairs) > 2:
            found = stats.spearmanr(*zip(*pairs, strict=True))
            print(
                f"  Spearman of held-out drift and accuracy over {len(pairs)} settings: {found.statistic:.3f}"
            )


if __name__ == "__main__":
    main()
