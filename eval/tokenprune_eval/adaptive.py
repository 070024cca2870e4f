"""Budgets that follow the picture, and escalation, against the same mean for all.

``python -m tokenprune_eval.adaptive``

Every arm keeps as much on average; what "auto" makes of it, on held-out questions, paired question by question.
Thresholds are calibrated on training scenes. Goes on where its CSV ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import tokenprune
from tokenprune.adaptive import RULES
from tokenprune.analysis import calibration_calls, load_calibration
from tokenprune.compare.statistics import difference
from tokenprune_eval.auto import pictures_of
from tokenprune_eval.results import Results
from tokenprune_testbed import Sample, evaluate, evaluation_set, load, pages
from tokenprune_testbed.evaluate import MAX_NEW_TOKENS
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.pages import evaluation_pages

FIXED, PAGES = "fixed", "pages"
KINDS = (
    "attribute",
    "identity",
    "position",
    "counting",
    "existence",
    "reading",
    "difference",
    "ground",
    "region",
    "tint",
    "line",
    "page",
)
COLUMNS = [
    *("key", "model", "keep", "arm", "tau", "questions", "prefilled", "again"),
    *("accuracy", "low", "high", *KINDS, "date"),
]
#: Shares of the prompts that are prefilled again, at three times the budget.
AGAIN = (0.1, 0.25, 0.5)
#: Floors of pages under the guard for text.
FLOORS = (0.5, 0.75)
ARMS = (FIXED, *RULES, *(f"again {share:g}" for share in AGAIN), *(f"floor {share:g}" for share in FLOORS))


def questions_to(model: str, count: int) -> list[Sample]:
    """Held-out questions of the kind that a testbed model was trained on."""
    return evaluation_pages(count) if model == PAGES else evaluation_set(count, seed=0)


def longest_answer(model: str) -> int:
    """In new tokens."""
    return pages.MAX_NEW_TOKENS if model == PAGES else MAX_NEW_TOKENS


@dataclass
class Bench:
    """A testbed model, its questions, and unlabelled training pictures to calibrate on."""

    name: str
    questions: int
    batch_size: int

    def __post_init__(self) -> None:
        self.model, self.processor = load(self.name)
        self.samples = questions_to(self.name, self.questions)
        if self.name == PAGES:
            shown = evaluation_pages(96, seed=2, split="train")
            self.calls = [dict(make_inputs(self.processor, [sample])) for sample in shown]
        else:
            self.calls = list(calibration_calls(self.processor, load_calibration("testbed", 96)))

    def settings(self, arm: str, keep: float) -> dict[str, Any]:
        """Arguments of `wrap`."""
        if arm == FIXED:
            return {"keep": keep}
        if arm in RULES:
            asked = tokenprune.Adaptive(keep, arm, low=keep / 3, high=min(1.0, 3 * keep))  # type: ignore[arg-type]
            return {"keep": tokenprune.calibrate(self.model, self.calls, asked)}
        name, _, number = arm.partition(" ")
        share = float(number)
        if name == "floor":
            return {"keep": keep, "text_floor": share}
        return {
            "keep": keep,
            "escalate": tokenprune.calibrate_escalation(
                self.model, self.calls, share, min(1.0, 3 * keep), keep=keep
            ),
        }

    def row(self, arm: str, keep: float) -> tuple[dict[str, str], list[bool]]:
        """What came of it: `prefilled` is the share of all visual tokens that layers saw, both times counted."""
        settings = self.settings(arm, keep)
        with tokenprune.pruned(self.model, **settings):
            # One by one where prompts are done again: a batch is done again as a whole, which says nothing of rows.
            size = 1 if "escalate" in settings else self.batch_size
            result = evaluate(
                self.model, self.processor, self.samples, size, max_new_tokens=longest_answer(self.name)
            )
            total = tokenprune.report(self.model, total=True)
        tokens = 144 * sum(len(sample.images) for sample in self.samples)
        budget = settings["keep"]
        row = {
            "model": self.name,
            "keep": f"{keep:g}",
            "arm": arm,
            "tau": f"{budget.tau:.5g}" if isinstance(budget, tokenprune.Adaptive) else "",
            "date": date.today().isoformat(),
            "questions": str(len(self.samples)),
            "prefilled": f"{total.retention_average * total.tokens / tokens:.4f}",
            "again": f"{total.tokens / tokens - 1:.4f}",
            "accuracy": f"{result.overall.accuracy:.4f}",
            "low": f"{result.overall.low:.4f}",
            "high": f"{result.overall.high:.4f}",
        }
        row |= {name: f"{score.accuracy:.4f}" for name, score in result.families.items() if name in KINDS}
        return row, list(result.correct)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the CSV yet, and print it as Markdown."""
    parser = argparse.ArgumentParser(description="Adaptive budgets and escalation on the testbeds.")
    parser.add_argument("--model", default="small")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.33, 0.22, 0.11])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--csv", type=Path, default=Path("eval/results/adaptive.csv"))
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    options = parser.parse_args(argv)
    results = Results(options.csv, COLUMNS)
    results.load()
    bench: Bench | None = None
    for keep in () if options.summary else options.budgets:
        for arm in options.arms:
            key = f"{options.model} {keep:g} {arm}"
            if key in results.rows:
                continue
            bench = bench or Bench(options.model, options.questions, options.batch_size)
            row, correct = bench.row(arm, keep)
            results.add({"key": key, **row}, correct)
            print(key, row["prefilled"], row["accuracy"], flush=True)
    print(table(results))
    print(by_kind(results))


def by_kind(results: Results) -> str:
    """Accuracy by kind of question, and in brackets the paired difference to the same mean for all, in points."""
    lines = ["| | kept | " + " | ".join(KINDS) + " |", "|---|---:|" + "---:|" * len(KINDS)]
    for key, row in results.rows.items():
        fixed = f"{row['model']} {row['keep']} {FIXED}"
        kinds = [sample.family for sample in questions_to(row["model"], int(row["questions"]))]
        cells = []
        for kind in KINDS:
            own = np.array([other == kind for other in kinds])
            cell = f"{100 * float(row[kind]):.0f}" if row.get(kind) else ""
            if row["arm"] != FIXED and fixed in results.bits and own.any():
                points = 100 * (results.correct(key)[own].mean() - results.correct(fixed)[own].mean())
                cell += f" ({points:+.0f})"
            cells.append(cell)
        lines.append(
            f"| {row['model']}, {row['arm']} | {float(row['keep']):.0%} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def table(results: Results) -> str:
    """Prefilled tokens, accuracy, and the paired difference to the same mean for all, in points."""
    lines = [
        "| | kept | prefilled | again | right % | minus fixed, points |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for key, row in results.rows.items():
        fixed = f"{row['model']} {row['keep']} {FIXED}"
        against = ""
        if row["arm"] != FIXED and fixed in results.bits and key in results.bits:
            found = difference(
                np.asarray(results.correct(key)),
                np.asarray(results.correct(fixed)),
                tuple(range(int(row["questions"])))
                if row["model"] == PAGES
                else pictures_of(int(row["questions"])),
            )
            against = str(found)
        accuracy = f"{100 * float(row['accuracy']):.1f} [{100 * float(row['low']):.1f}, {100 * float(row['high']):.1f}]"
        shares = f"{float(row['prefilled']):.1%} | {float(row['again']):.1%}"
        lines.append(
            f"| {row['model']}, {row['arm']} | {float(row['keep']):.0%} | {shares} | {accuracy} | {against} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
