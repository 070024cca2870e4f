"""Run an experiment, or go on with it where its CSV ends, and print it as Markdown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenprune_eval.experiments import ablations, adaptive, auto, stages
from tokenprune_eval.experiments.base import Experiment
from tokenprune_eval.experiments.bench import Bench
from tokenprune_eval.experiments.rows import Rows

EXPERIMENTS = {
    own.name: own
    for own in (
        auto.EXPERIMENT,
        ablations.EXPERIMENT,
        stages.EXPERIMENT,
        adaptive.EXPERIMENT,
    )
}


def main(argv: Sequence[str] | None = None) -> None:
    """See `EXPERIMENTS`."""
    parser = argparse.ArgumentParser(description="Settings of pruning on held-out questions of a testbed.")
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--models", nargs="+", help="small, smol, pages, or RUN/model")
    parser.add_argument("--budgets", type=float, nargs="+")
    parser.add_argument("--questions", type=int)
    parser.add_argument("--prompts", type=int, help="for drift")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--only", nargs="+", help="arms whose names contain one of these")
    parser.add_argument("--csv", type=Path, help="(default: eval/results/NAME.csv)")
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    options = parser.parse_args(argv)
    experiment = EXPERIMENTS[options.name]
    rows = Rows(options.csv or Path(f"eval/results/{options.name}.csv"), experiment.header())
    rows.load()
    if not options.summary:
        for model in options.models or experiment.models:
            bench = Bench(
                model,
                options.questions or experiment.questions,
                options.prompts or experiment.prompts,
                options.batch_size,
            )
            run(experiment, bench, rows, options.budgets or experiment.budgets, options.only)
    print(experiment.show(rows))


def run(
    experiment: Experiment,
    bench: Bench,
    rows: Rows,
    budgets: Sequence[float],
    only: Sequence[str] | None = None,
) -> None:
    """Measure the arms that have no row yet."""
    for keep in (None, *budgets):
        for arm, setting in experiment.arms(bench, keep).items():
            key = " ".join(filter(None, (bench.name, "" if keep is None else f"{keep:g}", arm)))
            if key in rows.rows or (only and not any(part in arm for part in only)):
                continue
            found, correct = experiment.measure(bench, arm, setting)
            place = {"model": bench.name, "keep": "" if keep is None else f"{keep:g}", "arm": arm}
            rows.add({"key": key, **place, **found}, correct)
            print(f"{key}: {float(found['accuracy']):.1%}", flush=True)


if __name__ == "__main__":
    main()
