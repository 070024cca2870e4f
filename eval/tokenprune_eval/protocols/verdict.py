"""From results files to a verdict: each score beside the published one, within or outside."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.errors import ConfigError
from tokenprune_eval.protocols.table import NONE, Table, Task


@dataclass(frozen=True)
class Line:
    """One number beside its published one.

    Attributes:
        what: it is.
        found: here; NaN where the run is missing.
        published: None where nothing is.
        tolerance: how far off they may be.
    """

    what: str
    found: float
    published: float | None
    tolerance: float

    @property
    def word(self) -> str:
        """ "within", "OUTSIDE", "missing", or "" where nothing is published."""
        if math.isnan(self.found):
            return "missing"
        if self.published is None:
            return ""
        return "within" if abs(self.found - self.published) <= self.tolerance else "OUTSIDE"

    def __str__(self) -> str:
        published = "" if self.published is None else f"{self.published:.1f}"
        return f"{self.what:<44}{self.found:>9.1f}{published:>11}  {self.word}".rstrip()


def verdict(table: Table, out: Path, names: Mapping[str, str] | None = None) -> list[Line]:
    """Every number of a table.

    Args:
        table: the published one.
        out: where `run` has put a folder per run.
        names: of the tasks where they ran under others (a dry run).

    Raises:
        ConfigError: there is no unpruned run, to which everything is relative.
    """
    scores = {name: _scores(table, out / name, names or {}) for name in table.runs()}
    if not scores[NONE]:
        raise ConfigError(
            f"there are no results of the unpruned model in {str(out / NONE)!r}; run that first"
        )
    whole = scores[NONE]
    lines = [_unpruned(task, whole, table) for task in table.tasks]
    for method in table.methods:
        for number, budget in enumerate(table.budgets):
            own = scores[f"{method.name}-{budget}"]
            shares = {task: 100 * own[task] / whole[task] for task in own if whole.get(task)}
            mean = sum(shares.values()) / len(shares) if len(shares) == len(table.tasks) else math.nan
            published = method.published[number] if method.published else None
            title = f"{method.name} at {budget}: mean % of unpruned"
            lines.append(Line(title, mean, published, table.tolerance.mean))
            lines += [Line(f"    {task} %", share, None, 0.0) for task, share in shares.items()]
    return lines


def _unpruned(task: Task, whole: Mapping[str, float], table: Table) -> Line:
    tolerance = table.tolerance.unpruned * (task.unpruned or 0.0) / 100
    return Line(f"unpruned {task.name}", whole.get(task.name, math.nan), task.unpruned, tolerance)


def _scores(table: Table, folder: Path, names: Mapping[str, str]) -> dict[str, float]:
    """Of the tasks that have results; the newest file counts."""
    results: dict[str, Any] = {}
    for path in sorted(folder.rglob("*_results.json"), key=lambda p: p.name):
        results |= json.loads(path.read_text())["results"]
    found = {}
    for task in table.tasks:
        own = results.get(names.get(task.name, task.name), {})
        values = [own.get(f"{metric},none") for metric in task.metrics]
        if all(isinstance(value, int | float) for value in values):
            found[task.name] = task.scale * sum(values)
    return found
