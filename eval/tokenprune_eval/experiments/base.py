"""What an experiment is: arms, each a setting of pruning, at budgets, on a testbed model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune_eval.experiments.bench import ROW, Bench
from tokenprune_eval.experiments.rows import Rows

Setting = Mapping[str, Any]
#: Columns of an arm's row, and which questions it got right.
Measured = tuple[dict[str, str], Sequence[bool]]


def drift_and_accuracy(bench: Bench, arm: str, arguments: Setting) -> Measured:
    """Of a setting of `wrap`."""
    return bench.row(arguments), bench.answers(arguments).correct


@dataclass(frozen=True)
class Experiment:
    """Data of an experiment; its CSV is ``eval/results/NAME.csv``.

    Attributes:
        name: of the experiment.
        says: what it asks.
        arms: by name what `measure` is given, at a budget; None is the unpruned model, asked once.
        models, budgets, questions, prompts: of a run, where the command line does not say; prompts for drift.
        columns: of what is measured.
        measure: one arm.
        show: rows as Markdown.
    """

    name: str
    says: str
    arms: Callable[[Bench, float | None], Mapping[str, Setting]]
    models: Sequence[str] = ("small", "smol")
    budgets: Sequence[float] = (0.33, 0.22, 0.11)
    questions: int = 1000
    prompts: int = 96
    columns: Sequence[str] = ROW
    measure: Callable[[Bench, str, Setting], Measured] = drift_and_accuracy
    show: Callable[[Rows], str] = lambda rows: ""

    def header(self) -> list[str]:
        """Of the CSV."""
        return ["key", "model", "keep", "arm", *self.columns]
