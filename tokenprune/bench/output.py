"""A row of measurements as a table on the terminal, a line of a CSV, Markdown, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune import tables
from tokenprune.optional import check_installed

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, str]

#: (label, column of a ratio, "%" where it is a share); what a row has nothing of is left out.
SPEED = (
    ("prefill, unpruned / pruned", "unpruned/ours", ""),
    ("ideal / pruned", "ideal/ours", ""),
    ("unpruned / ideal", "unpruned/ideal", ""),
    ("scoring and compacting / unpruned prefill", "extra/unpruned", "%"),
    ("`keep=1.0` / unpruned", "keep=1.0/unpruned", ""),
    ("unpruned again / unpruned: the noise", "unpruned again/unpruned", ""),
    ("decode per token, pruned / unpruned", "decode ours/unpruned", ""),
    ("32-token answer, unpruned / pruned", "answer32 unpruned/ours", ""),
    ("256-token answer, unpruned / pruned", "answer256 unpruned/ours", ""),
)


def cell(row: Row, column: str, unit: str) -> str:
    """A ratio with its quintiles; "" where there is none."""
    if not row.get(column):
        return ""
    values = [float(row[column + end]) for end in ("", " p20", " p80")]
    if unit == "%":
        return f"{values[0]:.1%} ({values[1]:.1%} to {values[2]:.1%})"
    return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"


def memory_cells(row: Row) -> dict[str, str]:
    """Cache and peak in MiB, by label."""

    def mib(name: str) -> str:
        return f"{int(row[name]) / 2**20:.1f}"

    cells = {}
    for label, name in (("KV cache after the prompt", "kv_used"), ("peak memory of a prefill", "peak")):
        cells[label] = f"{mib(f'{name}_ours')} of {mib(f'{name}_unpruned')} MiB"
    return cells


def title(row: Row) -> str:
    """What was measured, in a line."""
    return (
        f"{row['geometry']}, batch {row['batch']}: {row['method']}, {row['keep']} kept on average, "
        f"{row['kept_after_cut']} of {row['visual']} visual tokens from layer {row['layer']}"
    )


def table(row: Row) -> Table:
    """For the terminal."""
    from rich.table import Table

    shown = Table("", "median (p20 to p80)", title=title(row), title_justify="left")
    for name in ("unpruned", "ideal", "ours", "uniform"):
        if row[f"t_{name}_ms"]:
            shown.add_row(f"prefill, {name}", f"{row[f't_{name}_ms']} ms")
    for label, column, unit in SPEED:
        text = cell(row, column, unit)
        if text:
            verdict = f", {row['verdict']}" if column == "ideal/ours" else ""
            shown.add_row(label.replace("`", "") + verdict, text)
    for name in ("unpruned", "ours"):
        shown.add_row(f"decode per token, {name}", f"{row[f'decode_{name}_ms']} ms")
    shown.add_row("FLOPs of the prefill, pruned / unpruned", row["flops_ratio"])
    for label, text in memory_cells(row).items():
        shown.add_row(label, text.replace("`", ""))
    shown.add_row("logits, ideal against ours", row["logits_error"])
    return shown


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each geometry, batch, method and machine, in the order of their first."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[row["geometry"], row["gpu"] or row["cpu"], row["batch"], row["method"]] = row
    return list(found.values())


def markdown(rows: Sequence[Row]) -> str:
    """A table of one geometry on one machine: a column per batch."""
    lines = []
    for label, column, unit in SPEED:
        cells = [cell(row, column, unit) for row in rows]
        if column == "ideal/ours":
            cells = [
                f"{text}, {row['verdict']}" if text else "" for text, row in zip(cells, rows, strict=True)
            ]
        if any(cells):
            lines.append([label, *(text or "not run" for text in cells)])
    lines.append(["FLOPs, pruned / unpruned", *(row["flops_ratio"] for row in rows)])
    memory = [memory_cells(row) for row in rows]
    lines += [[label, *(own[label] for own in memory)] for label in memory[0]]
    titles = ["", *(f"batch {row['batch']}, {row['rounds']} rounds" for row in rows)]
    return tables.markdown(titles, lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of one geometry on one machine: times of each arm over the unpruned one's, by batch.

    Raises:
        ConfigError: matplotlib is missing.
    """
    check_installed("a figure", "matplotlib", extra="plot")
    import matplotlib
    from matplotlib.figure import Figure

    kinds = {
        "prefill": ("t_{}_ms", ("ideal", "ours")),
        "decode per token": ("decode_{}_ms", ("ours",)),
        "32-token answer": ("answer32_{}_ms", ("ours",)),
        "256-token answer": ("answer256_{}_ms", ("ours",)),
    }
    colours = {"ideal": "#bbbbbb", "ours": "#3b6ea5"}
    names = {"ideal": "ideal", "ours": "pruned"}
    matplotlib.rcParams["svg.hashsalt"] = "tokenprune"  # the same figure from the same numbers
    figure = Figure(figsize=(3.2 * len(rows), 2.6), layout="constrained")
    axes = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for own, row in zip(axes, rows, strict=True):
        ticks = []
        for at, (kind, (column, arms)) in enumerate(kinds.items()):
            whole = row[column.format("unpruned")]
            if not whole:
                continue
            ticks.append((at, kind.replace(" ", "\n", 1)))
            for shift, arm in enumerate(arms):
                value = row[column.format(arm)]
                if value:
                    own.bar(
                        at + 0.4 * shift - 0.2,
                        float(value) / float(whole),
                        0.38,
                        color=colours[arm],
                        label=names[arm],
                    )
        own.axhline(1, color="black", linewidth=0.8)
        own.set_xticks([at for at, _ in ticks], [kind for _, kind in ticks], fontsize=7)
        own.set_title(f"batch {row['batch']}", fontsize=9)
    axes[0].set_ylabel("time, unpruned = 1", fontsize=8)
    labels = {
        label: handle for own in axes for handle, label in zip(*own.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
