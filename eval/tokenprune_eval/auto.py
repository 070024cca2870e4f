"""What `wrap(model, keep=...)` is worth on the testbeds: ``python -m tokenprune_eval.auto``.

"auto" with the bundled profiles against the controls at the same average retention, on held-out questions; and its
difference to them, paired question by question, where both rows have their outcomes (auto_correct.csv).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tokenprune.analysis.memory import content_digest
from tokenprune.compare.statistics import difference
from tokenprune_eval.results import Results
from tokenprune_eval.settings import ROW, Bench
from tokenprune_testbed import evaluation_set

COLUMNS = ["key", "model", "keep", "arm", *ROW]
ARMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "uniform": {"method": "uniform", "layer": 0},
    "random": {"method": "random", "layer": 0},
    "vflowopt, untuned": {"method": "vflowopt"},
    "merge, untuned": {"method": "merge"},
    "merge of divprune, untuned": {"method": "merge", "of": "divprune"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the CSV yet, and print it as Markdown."""
    parser = argparse.ArgumentParser(description="The default against the controls.")
    parser.add_argument("--models", nargs="+", default=["small", "smol"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.33, 0.22, 0.11])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", choices=["none", *ARMS], default=["none", *ARMS])
    parser.add_argument("--csv", type=Path, default=Path("eval/results/auto.csv"))
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    options = parser.parse_args(argv)
    results = Results(options.csv, COLUMNS)
    results.load()
    for model in () if options.summary else options.models:
        bench = Bench(model, options.questions)
        cells = [(f"{bench.name} none", "none", None, {"method": "none"})]
        cells += [
            (f"{bench.name} {keep} {arm}", arm, keep, {**own, "keep": keep})
            for keep in options.budgets
            for arm, own in ARMS.items()
        ]
        for key, arm, keep, arguments in cells:
            if key in results.rows or arm not in options.arms:
                continue
            row = bench.row(arguments)
            row |= {"key": key, "model": bench.name, "keep": str(keep or ""), "arm": arm}
            results.add(row, bench.answers(arguments).correct)
            print(f"{key}: {float(row['accuracy']):.1%}, drift {row['held_out_drift']}", flush=True)
    print(table(results))
    for line in differences(results):
        print(line)


def differences(results: Results) -> list[str]:
    """How many points "auto" is above each other arm, with the 95 % bootstrap interval over pictures."""
    lines = []
    for key, row in results.rows.items():
        if row["arm"] != "auto" or key not in results.bits:
            continue
        ours, pictures = results.correct(key), pictures_of(int(row["questions"]))
        for arm in ARMS:
            other = f"{row['model']} {row['keep']} {arm}"
            if (
                arm != "auto"
                and other in results.bits
                and results.rows[other]["questions"] == row["questions"]
            ):
                found = difference(ours, results.correct(other), pictures)
                lines.append(f"* {row['model']}, {float(row['keep']):.0%}: auto - {arm}: {found}")
    return lines


@cache
def pictures_of(questions: int) -> tuple[str, ...]:
    """Of the held-out questions; those about one picture stand or fall together."""
    samples = evaluation_set(questions, seed=0)
    return tuple(content_digest(*(torch.from_numpy(i.copy()) for i in s.images)) for s in samples)


def table(results: Results) -> str:
    """Accuracy in % with 95 % Wilson intervals, by model and retention."""
    rows = list(results.rows.values())
    columns = sorted({(r["model"], r["keep"]) for r in rows if r["keep"]}, key=lambda c: (c[0], -float(c[1])))
    by_key = {(r["model"], r["keep"], r["arm"]): r for r in rows}
    lines = [
        "| | " + " | ".join(f"{model} {float(keep):.0%}" for model, keep in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for arm in ("none", *ARMS):
        shown = [by_key.get((model, "" if arm == "none" else keep, arm)) for model, keep in columns]
        lines.append(f"| {arm} | " + " | ".join(map(_cell, shown)) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    accuracy, low, high = (100 * float(row[name]) for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
