"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune.compare.arms import CONTROLS, NONE
from tokenprune.compare.figures import accuracy_against_retention, accuracy_against_time
from tokenprune.compare.pictures import draw_pictures
from tokenprune.compare.run import Comparison
from tokenprune.compare.summary import Row, Summary

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    found: Comparison,
    path: Path,
    about: Mapping[str, str],
    command: str,
) -> None:
    """Write the report.

    Args:
        found: what came out.
        path: of the file.
        about: of the model, data, machine and versions, shown as it is.
        command: that makes this report.
    """
    from jinja2 import Environment

    summary = found.summary
    pictures = draw_pictures(found.asker, found.arms, summary)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text()
    )
    page.globals.update(percent=percent, share=share, bytes=megabytes, drop=drop)
    path.write_text(
        page.render(
            summary=summary,
            about=about,
            command=command,
            whole=summary.whole,
            methods=[name for name in summary.names if name not in CONTROLS],
            controls=[name for name in summary.names if name in CONTROLS],
            losses=losses(summary),
            figure=accuracy_against_retention(summary) if summary.whole.accuracy else None,
            timed=timed_figures(summary),
            sizes=time_columns(summary),
            kept=pictures.kept,
            failures=pictures.failures,
            trouble=pictures.trouble,
            NONE=NONE,
        ),
        encoding="utf-8",
    )


def losses(summary: Summary) -> list[tuple[str, list[tuple[float, list[str]]]]]:
    """By method: at which budgets it loses to which controls; methods that lose nowhere have an empty list."""
    found = []
    for name in summary.names:
        if name in CONTROLS:
            continue
        own = [row for row in summary.rows if row.name == name and row.keep is not None and row.loses_to]
        found.append((name, [(row.keep or 0.0, row.loses_to) for row in own]))
    return found


def timed_figures(summary: Summary) -> list[str]:
    """Accuracy against the whole answer's time, by batch size."""
    if summary.whole.accuracy is None:
        return []
    sizes = sorted({size for size, _ in summary.whole.times})
    figures = (accuracy_against_time(summary, size, "whole answer") for size in sizes)
    return [figure for figure in figures if figure]


def time_columns(summary: Summary) -> list[tuple[int, str]]:
    """(batch size, what) that were measured."""
    return sorted(summary.whole.times, key=lambda c: c[0])


def percent(value: float, digits: int = 1) -> str:
    return "" if value != value else f"{100 * value:.{digits}f}"


def share(found: Any) -> str:
    return "" if found is None else str(found)


def megabytes(value: float) -> str:
    return "" if value != value else f"{value / 2**20:.2f}"


def drop(row: Row, whole: Row, family: str) -> float | None:
    """Points a family loses against the unpruned model."""
    own, theirs = row.families.get(family), whole.families.get(family)
    return None if own is None or theirs is None else 100 * (own.value - theirs.value)
