"""Figures of what was measured layer by layer; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokenprune.analysis.layers import LayerStatistics
from tokenprune.errors import ConfigError
from tokenprune.optional import check_installed
from tokenprune.profiles.collapse import Collapse


def plot_collapse(
    collapses: Mapping[str, Collapse], path: Path, *, text: Mapping[str, Any] | None = None
) -> None:
    """Diversity on entering each layer with its 95 % interval, one panel per estimator.

    Args:
        collapses: by estimator.
        path: where the figure goes; its suffix says the format.
        text: by estimator, the text tokens' mean curve (L + 1,), drawn beside the visual tokens'.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(len(collapses))
    for axes, (name, found) in zip(figure.axes, collapses.items(), strict=True):
        layers = np.arange(len(found.mean))
        axes.fill_between(layers, found.low, found.high, alpha=0.25, linewidth=0)
        axes.plot(layers, found.mean, marker="o", markersize=3, label="visual tokens")
        if text is not None and name in text:
            axes.plot(layers, text[name], linestyle="--", linewidth=1, label="text tokens")
        axes.axvline(
            found.steepest,
            color="tab:red",
            linestyle="-" if found.clear else ":",
            linewidth=1,
            label=f"largest drop: {found.steepest}, {'clear' if found.clear else 'not clear'}",
        )
        axes.set(title=name, xlabel="entering layer", ylabel="diversity")
        axes.legend(fontsize=7)
    save_figure(figure, path)


def plot_attention(statistics: LayerStatistics, path: Path) -> None:
    """The last position's attention by layer: entropy of every head, and the share that goes to visual tokens.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(2)
    left, right = figure.axes
    entropy = np.nanmean(statistics.attention_entropy, 0)
    for head in range(entropy.shape[1]):
        left.plot(entropy[:, head], linewidth=0.8, alpha=0.6)
    left.plot(entropy.mean(1), color="black", label="mean of heads")
    left.set(title="attention entropy", xlabel="layer", ylabel="of log(keys)", ylim=(0, 1))
    left.legend(fontsize=7)
    right.plot(np.nanmean(statistics.visual_share, 0), marker="o", markersize=3)
    right.set(title="attention on visual tokens", xlabel="layer", ylabel="share", ylim=(0, 1))
    save_figure(figure, path)


def new_figure(panels: int, columns: int = 3) -> Any:
    """A figure of panels, so many in a row.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_installed("a figure", "matplotlib", extra="plot")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[panels:]:
        axes.remove()
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write it; the suffix says the format.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an unknown suffix
        raise ConfigError(f"cannot write {str(path)!r}: {error}") from None
