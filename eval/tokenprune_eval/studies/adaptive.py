"""Budgets that follow the picture, and escalation, against the same mean for all.

``python -m tokenprune_eval.studies.adaptive``

Every arm keeps as much on average; what "auto" makes of it, on held-out questions, paired question by question.
Thresholds are calibrated on training pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokenprune
from tokenprune import tables
from tokenprune.adaptive import RULES
from tokenprune.analysis.memory import content_digest
from tokenprune.compare.statistics import difference
from tokenprune_eval.studies.bench import Bench, questions_to
from tokenprune_eval.studies.rows import Rows
from tokenprune_testbed import FAMILIES, evaluate, evaluation_set
from tokenprune_testbed.pages import PAGE_FAMILIES

FIXED, PAGES = "fixed", "pages"
KINDS = (*FAMILIES, *PAGE_FAMILIES)
COLUMNS = [
    *("key", "model", "keep", "arm", "tau", "questions", "prefilled", "again", "accuracy", "low", "high"),
    *(*KINDS, "date"),
]
#: Shares of the prompts that are prefilled again, at three times the budget.
AGAIN = (0.1, 0.25, 0.5)
#: Floors of pages under the guard for text.
FLOORS = (0.5, 0.75)


def arms(bench: Bench, keep: float) -> dict[str, dict[str, Any]]:
    """Arguments of `wrap` by name."""
    calls = bench.calibration(96, 2 if bench.name == PAGES else 0)
    found: dict[str, dict[str, Any]] = {FIXED: {"keep": keep}}
    for rule in RULES:
        asked = tokenprune.Adaptive(keep, rule, low=keep / 3, high=min(1.0, 3 * keep))  # type: ignore[arg-type]
        found[rule] = {"keep": partial(tokenprune.calibrate, bench.model, calls, asked)}
    for share in AGAIN:
        more = partial(
            tokenprune.calibrate_escalation, bench.model, calls, share, min(1.0, 3 * keep), keep=keep
        )
        found[f"again {share:g}"] = {"keep": keep, "escalate": more}
    if bench.name == PAGES:
        found |= {f"floor {share:g}": {"keep": keep, "text_floor": share} for share in FLOORS}
    return found


def measure(bench: Bench, setting: Mapping[str, Any]) -> tuple[dict[str, str], list[bool]]:
    """What came of it: `prefilled` is the share of all visual tokens that layers saw, both times counted.

    Args:
        setting: of `wrap`; what is called is calibrated first.
    """
    given = {name: value() if callable(value) else value for name, value in setting.items()}
    with tokenprune.pruned(bench.model, **given):
        # One by one where prompts are done again: a batch is done again as a whole, which says nothing of rows.
        size = 1 if "escalate" in given else bench.batch_size
        result = evaluate(bench.model, bench.processor, bench.samples, size, max_new_tokens=bench.longest)
        total = tokenprune.report(bench.model, total=True)
    tokens = 144 * sum(len(sample.images) for sample in bench.samples)
    budget = given["keep"]
    row = {
        **bench.accuracy(result),
        "tau": f"{budget.tau:.5g}" if isinstance(budget, tokenprune.Adaptive) else "",
        "date": date.today().isoformat(),
        "prefilled": f"{total.retention_average * total.tokens / tokens:.4f}",
        "again": f"{total.tokens / tokens - 1:.4f}",
    }
    return row | {name: f"{score.accuracy:.4f}" for name, score in result.families.items()}, result.correct


def by_kind(results: Rows) -> str:
    """Accuracy by kind of question, and in brackets the paired difference to the same mean for all, in points."""
    lines = []
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
        lines.append([f"{row['model']}, {row['arm']}", f"{float(row['keep']):.0%}", *cells])
    return tables.markdown(["", "kept", *KINDS], lines)


def table(results: Rows) -> str:
    """Prefilled tokens, accuracy, and the paired difference to the same mean for all, in points."""
    lines = []
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
        right, low, high = (100 * float(row[name]) for name in ("accuracy", "low", "high"))
        shares = [f"{float(row[name]):.1%}" for name in ("prefilled", "again")]
        name, kept = f"{row['model']}, {row['arm']}", f"{float(row['keep']):.0%}"
        lines.append([name, kept, *shares, f"{right:.1f} [{low:.1f}, {high:.1f}]", against])
    return tables.markdown(["", "kept", "prefilled", "again", "right %", "minus fixed, points"], lines)


@cache
def pictures_of(questions: int) -> tuple[str, ...]:
    """Of the held-out questions; those about one picture stand or fall together."""
    samples = evaluation_set(questions, seed=0)
    return tuple(content_digest(*(torch.from_numpy(i.copy()) for i in s.images)) for s in samples)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the arms that have no row yet, and print all as Markdown."""
    parser = argparse.ArgumentParser(
        description="Budgets that follow the picture, against the same mean for all."
    )
    parser.add_argument("--models", nargs="+", default=["small", "smol"], help="small, smol or pages")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.33, 0.22, 0.11])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--only", nargs="+", help="arms whose names contain one of these")
    parser.add_argument("--csv", type=Path, default=Path("eval/results/adaptive.csv"))
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    options = parser.parse_args(argv)
    results = Rows(options.csv, COLUMNS)
    results.load()
    for model in () if options.summary else options.models:
        bench = Bench(model, options.questions, 0, options.batch_size)
        for keep in options.budgets:
            run(bench, keep, results, options.only)
    print(f"{table(results)}\n{by_kind(results)}")


def run(bench: Bench, keep: float, results: Rows, only: Sequence[str] | None = None) -> None:
    """Measure the arms at a budget that have no row yet."""
    for arm, setting in arms(bench, keep).items():
        key = f"{bench.name} {keep:g} {arm}"
        if key in results.rows or (only and not any(part in arm for part in only)):
            continue
        found, correct = measure(bench, setting)
        results.add({"key": key, "model": bench.name, "keep": f"{keep:g}", "arm": arm, **found}, correct)
        print(f"{key}: {float(found['accuracy']):.1%}", flush=True)


if __name__ == "__main__":
    main()
