"""What `wrap(model, keep=...)` is worth on the testbeds: ``python -m tokenprune_eval.experiments auto``.

"auto" with the bundled profiles against the controls at the same average retention, on held-out questions; and its
difference to them, paired question by question, where both rows have their outcomes (auto_correct.csv).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tokenprune import tables
from tokenprune.analysis.memory import content_digest
from tokenprune.compare.statistics import difference
from tokenprune_eval.experiments.base import Experiment
from tokenprune_eval.experiments.bench import Bench
from tokenprune_eval.experiments.rows import Rows
from tokenprune_testbed import evaluation_set

ARMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "uniform": {"method": "uniform", "layer": 0},
    "random": {"method": "random", "layer": 0},
    "vflowopt, untuned": {"method": "vflowopt"},
    "merge, untuned": {"method": "merge"},
    "merge of divprune, untuned": {"method": "merge", "of": "divprune"},
}


def arms(bench: Bench, keep: float | None) -> dict[str, dict[str, Any]]:
    """Arguments of `wrap` by name."""
    return (
        {"none": {"method": "none"}}
        if keep is None
        else {n: {**own, "keep": keep} for n, own in ARMS.items()}
    )


def differences(results: Rows) -> list[str]:
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


def table(results: Rows) -> str:
    """Accuracy in % with 95 % Wilson intervals, by model and retention."""
    rows = list(results.rows.values())
    columns = sorted({(r["model"], r["keep"]) for r in rows if r["keep"]}, key=lambda c: (c[0], -float(c[1])))
    by_key = {(r["model"], r["keep"], r["arm"]): r for r in rows}
    lines = [
        [arm, *(_cell(by_key.get((model, "" if arm == "none" else keep, arm))) for model, keep in columns)]
        for arm in ("none", *ARMS)
    ]
    return tables.markdown(["", *(f"{model} {float(keep):.0%}" for model, keep in columns)], lines)


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    accuracy, low, high = (100 * float(row[name]) for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} [{low:.1f}, {high:.1f}]"


EXPERIMENT = Experiment(
    "auto",
    "The default against the controls, at the same average retention.",
    arms,
    show=lambda rows: "\n".join([table(rows), *differences(rows)]),
)
