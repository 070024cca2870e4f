"""README's table of speed, those of docs/performance.md and the figures, from the benchmark's CSV.

``python -m tokenprune_eval.speed``
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tokenprune.arguments import AUTO
from tokenprune.bench.output import Row, latest, markdown, plot

Marks = tuple[str, str]
MARKS: Marks = ("<!-- speed: begin -->", "<!-- speed: end -->")
SUMMARY_MARKS: Marks = ("<!-- summary: begin -->", "<!-- summary: end -->")
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
    titles = [title for title, _, _ in SUMMARY]
    lines = [
        "| | visual tokens | machine | method | batch | "
        + " | ".join(titles)
        + " | of the ideal | KV cache |",
        "|---|---:|---|---|---|" + "---:|" * (len(SUMMARY) + 2),
    ]
    for row in ordered(rows):
        cells = []
        for _, column, turned in SUMMARY:
            value = float(row[column]) if row[column] else 0.0
            cells.append("" if not value else f"{1 / value if turned else value:.2f}x")
        ideal = f"{float(row['ideal/ours']):.0%}" if row["ideal/ours"] else ""
        if row["verdict"] == "launch-bound":
            ideal += ", launch-bound"
        kv = int(row["kv_used_ours"]) / int(row["kv_used_unpruned"])
        cells += [ideal, f"{kv:.0%}"]
        lines.append(
            f"| {row['geometry']} | {row['visual']} | {machine_of(row)} | {row['method']} | {row['batch']} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


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


def put(path: Path, text: str, marks: Marks = MARKS) -> None:
    """Between the marks of a file.

    Raises:
        SystemExit: it has none.
    """
    before, mark, rest = path.read_text().partition(marks[0])
    if not mark:
        raise SystemExit(f"{path} has no {marks[0]}")
    path.write_text(f"{before}{mark}\n{text}{marks[1]}{rest.partition(marks[1])[2]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the CSV, draw the figures, put the tables between the marks."""
    parser = argparse.ArgumentParser(description="Make what the documents say of speed from measurements.")
    parser.add_argument("--csv", type=Path, default=Path("eval/results/bench.csv"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args(argv)
    with options.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    put(options.readme, summary(headline(rows)))
    put(options.page, summary(rows), SUMMARY_MARKS)
    put(options.page, section(rows, options.csv.parent))
    print(summary(rows))


if __name__ == "__main__":
    main()
