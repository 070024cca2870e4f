"""What `tokenprune compare` measured on the testbeds' models, for those who show a few questions only.

`python -m tokenprune_eval.publish accuracy` copies it out of the committed comparisons.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenprune import tables

FILE = Path(__file__).with_name("compared.csv")
METHODS = ("none", "auto", "vflowopt", "uniform", "random", "entropyprune")
COPIED = ("keep", "questions", "accuracy", "accuracy low", "accuracy high", "cpu", "date")


@dataclass(frozen=True)
class Compared:
    """Accuracy of a method on `questions` held-out questions, with its 95 % interval.

    Attributes:
        accuracy, low, high: shares.
        questions: how many.
        cpu, date: where and when it was measured.
    """

    accuracy: float
    low: float
    high: float
    questions: int
    cpu: str
    date: str


def read(model: str) -> dict[tuple[str, float | None], Compared]:
    """By method and average retention (None: unpruned), of "small" or "smol"."""
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model]
    return {
        (row["method"], float(row["keep"]) if row["keep"] else None): Compared(
            float(row["accuracy"]),
            float(row["accuracy low"]),
            float(row["accuracy high"]),
            int(row["questions"]),
            row["cpu"],
            row["date"],
        )
        for row in rows
    }


def write(rows: Sequence[Mapping[str, str]]) -> None:
    """Rows of model, method and `COPIED`."""
    tables.write(FILE, rows)
