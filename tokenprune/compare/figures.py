"""The report's figures, as SVG text: accuracy against retention, and against time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

from tokenprune.compare.arms import CONTROLS
from tokenprune.compare.summary import Row, Summary

_COLORS = ("#0f766e", "#b45309", "#6d28d9", "#be123c", "#1d4ed8", "#4d7c0f", "#a21caf")
_GREYS = ("#18181b", "#71717a", "#a1a1aa", "#52525b")
_MARKERS = "osD^vPX"


def accuracy_against_retention(summary: Summary) -> str:
    """SVG: a line per arm, whiskers are 95 % intervals, the unpruned model dashed across."""
    return _figure(summary, "visual tokens kept, average over layers (%)", lambda row: 100 * row.kept)


def accuracy_against_time(summary: Summary, batch_size: int, what: str) -> str | None:
    """SVG: milliseconds per batch; None where they were not measured."""
    if (batch_size, what) not in summary.whole.times:
        return None
    label = f"{what}, batch of {batch_size} (ms)"
    unpruned = summary.whole.times[batch_size, what]["ms"]
    return _figure(summary, label, lambda row: row.times.get((batch_size, what), {}).get("ms"), unpruned)


def _figure(
    summary: Summary, label: str, place: Callable[[Row], float | None], unpruned: float | None = None
) -> str:
    """`unpruned`: where the unpruned model is on the axis across, if it is not at its end."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "svg.hashsalt": "tokenprune", "axes.spines.top": False}):
        figure, axes = plt.subplots(figsize=(5.6, 4.0))
        axes.spines["right"].set_visible(False)
        for name, style in _styles(summary):
            own = [row for row in summary.rows if row.name == name and row.accuracy is not None]
            points = [(place(row), row.accuracy) for row in own]  # in the order of their budgets
            found = [(x, a) for x, a in points if x is not None and a is not None]
            if found:
                x, y = [x for x, _ in found], [100 * a.value for _, a in found]
                below = [100 * (a.value - a.low) for _, a in found]
                above = [100 * (a.high - a.value) for _, a in found]
                axes.errorbar(x, y, (below, above), label=name, capsize=2, elinewidth=0.8, **style)
        whole = summary.whole.accuracy
        if whole is not None:
            axes.axhline(100 * whole.value, color="#a1a1aa", linestyle=":", linewidth=1, label="none")
            if unpruned is not None:
                axes.plot([unpruned], [100 * whole.value], "*", color="#18181b", markersize=9)
                axes.axvline(unpruned, color="#a1a1aa", linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy (%)")
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        text = io.StringIO()
        figure.savefig(
            text, format="svg", metadata={"Date": None}, bbox_inches="tight"
        )  # the legend is below
        plt.close(figure)
    # Inside HTML only the element counts; its size follows the page.
    svg = text.getvalue()
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"',
        r"\1\2",
        svg[svg.index("<svg") :],
    )


def _styles(summary: Summary) -> Iterator[tuple[str, dict[str, Any]]]:
    colors, greys, markers = iter(_COLORS * 3), iter(_GREYS), iter(_MARKERS * 4)
    for name in summary.names:
        if name in CONTROLS:
            yield (
                name,
                {
                    "color": next(greys),
                    "marker": next(markers),
                    "linestyle": "--",
                    "linewidth": 1,
                    "markersize": 4,
                },
            )
        else:
            yield name, {"color": next(colors), "marker": next(markers), "linewidth": 1.6, "markersize": 5}
