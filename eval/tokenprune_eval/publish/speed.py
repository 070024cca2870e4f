"""README's table of speed, those of docs/performance.md and the figures, from the benchmark's CSV."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tokenprune import tables
from tokenprune.arguments import AUTO
from tokenprune.bench.output import Row, latest, markdown, plot

#: Columns of the summary: title, column of a ratio, whether the ratio is turned round (the text is then "x times").
SUMMARY = (
    ("prefill", "unpruned/ours", False),
    ("32 tokens", "answer32 unpruned/ours", False),
    ("256 tokens", "answer256 unpruned/ours", False),
    ("decoding", "decode ours/unpruned", True),
)


def machine_of(row: Row) -> str:
    """Where a row was measured."""
    threads = "" if row["gpu"] else f", {row['threads']} thread{'s' if row['threads'] != '1' else ''}"
    clock = ", processor time" if row["clock"] == "cpu" and not row["gpu"] else ""
    return f"{row['gpu'] or row['cpu']}{threads}{clock}"


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The newest of each, GPUs first, then by geometry, the default method before others, and batch."""

    def key(row: Row) -> tuple[bool, str, bool, str, int, bool]:
        default = row["method"].startswith(AUTO)
        ragged = "ragged" in row["batch"]
        return (
            not row["gpu"],
            row["geometry"],
            not default,
            row["method"],
            int(row["batch"].split()[0]),
            ragged,
        )

    return sorted(latest(rows), key=key)


def summary(rows: Sequence[Row]) -> str:
    """One line per geometry, method, batch and machine."""
    lines = []
    for row in ordered(rows):
        cells = [row["geometry"], row["visual"], machine_of(row), row["method"], row["batch"]]
        for _, column, turned in SUMMARY:
            value = float(row[column]) if row[column] else 0.0
            cells.append("" if not value else f"{1 / value if turned else value:.2f}x")
        ideal = f"{float(row['ideal/ours']):.0%}" if row["ideal/ours"] else ""
        if row["verdict"] == "launch-bound":
            ideal += ", launch-bound"
        kv = int(row["kv_used_ours"]) / int(row["kv_used_unpruned"])
        lines.append([*cells, ideal, f"{kv:.0%}"])
    titles = [title for title, _, _ in SUMMARY]
    columns = ["", "visual tokens", "machine", "method", "batch", *titles, "of the ideal", "KV cache"]
    return tables.markdown(columns, lines, dict.fromkeys((0, 2, 3, 4), "---")) + "\n"


def section(rows: Sequence[Row], figures: Path) -> str:
    """A table per geometry, method and machine, each with its figure."""
    parts = []

    def key(row: Row) -> tuple[str, str, str]:
        return row["geometry"], machine_of(row), row["method"]

    for (geometry, machine, method), group in groupby(ordered(rows), key=key):
        own = list(group)
        first = own[0]
        name = f"bench_{geometry}_{method.partition(':')[0]}_{'gpu' if first['gpu'] else 'cpu'}"
        plot(own, figures / f"{name}.svg")
        parts.append(
            f"**{geometry}** ({first['layers']} layers, d = {first['hidden']}, {first['visual']} visual tokens, "
            f"{first['keep']} kept on average: {first['kept_after_cut']} at the end, cut at {first['layer']}; "
            f"{method}; {machine}, {first['dtype']}, torch {first['torch']}, transformers "
            f"{first['transformers']}, {first['date']}):\n\n{markdown(own)}\n"
        )
    return "\n".join(parts)


def headline(rows: Sequence[Row]) -> list[Row]:
    """What README shows: all that ran on GPUs, and the default on a decoder that others have pretrained."""
    return [
        row for row in rows if row["gpu"] or (row["geometry"] == "smol" and row["method"].startswith(AUTO))
    ]
