"""Budgets that follow the picture, and escalation, against the same mean for all.

``python -m tokenprune_eval.experiments adaptive``

Every arm keeps as much on average; what "auto" makes of it, on held-out questions, paired question by question.
Thresholds are calibrated on training pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import partial
from typing import Any

import numpy as np

import tokenprune
from tokenprune import tables
from tokenprune.adaptive import RULES
from tokenprune.compare.statistics import difference
from tokenprune_eval.experiments.auto import pictures_of
from tokenprune_eval.experiments.base import Experiment, Measured
from tokenprune_eval.experiments.bench import Bench, questions_to
from tokenprune_eval.experiments.rows import Rows
from tokenprune_testbed import FAMILIES, evaluate
from tokenprune_testbed.pages import PAGE_FAMILIES

FIXED, PAGES = "fixed", "pages"
KINDS = (*FAMILIES, *PAGE_FAMILIES)
#: Shares of the prompts that are prefilled again, at three times the budget.
AGAIN = (0.1, 0.25, 0.5)
#: Floors of pages under the guard for text.
FLOORS = (0.5, 0.75)


def arms(bench: Bench, keep: float | None) -> dict[str, dict[str, Any]]:
    """Arguments of `wrap` by name."""
    if keep is None:
        return {}
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


def measure(bench: Bench, arm: str, setting: Mapping[str, Any]) -> Measured:
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


EXPERIMENT = Experiment(
    "adaptive",
    "Budgets that follow the picture, and escalation, against the same mean for all.",
    arms,
    columns=("tau", "questions", "prefilled", "again", "accuracy", "low", "high", *KINDS, "date"),
    measure=measure,
    show=lambda rows: f"{table(rows)}\n{by_kind(rows)}",
)
