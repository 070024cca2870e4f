"""README's section on speed and the figures, from the benchmark's CSV: ``python -m tokenprune_eval.speed``."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from tokenprune.bench.output import Row, latest, markdown, plot

MARKS = ("<!-- speed: begin -->", "<!-- speed: end -->")


def machine_of(row: Row) -> str:
    """Where a row was measured."""
    threads = "" if row["gpu"] else f", {row['threads']} thread{'s' if row['threads'] != '1' else ''}"
    clock = ", processor time" if row["clock"] == "cpu" and not row["gpu"] else ""
    where = f"{row['gpu'] or row['cpu']}{threads}{clock}"
    return f"{where}, {row['dtype']}, torch {row['torch']}, transformers {row['transformers']}"


def section(rows: Sequence[Row], figures: Path) -> str:
    """A table per geometry and machine, each with its figure."""
    parts = []

    def key(row: Row) -> tuple[str, str]:
        return row["geometry"], machine_of(row)

    ordered = sorted(latest(rows), key=lambda row: (not row["gpu"], row["geometry"]))
    for (geometry, machine), group in groupby(ordered, key=key):
        own = list(group)
        first = own[0]
        figure = figures / f"bench_{geometry}_{'gpu' if first['gpu'] else 'cpu'}.svg"
        plot(own, figure)
        parts.append(
            f"**{geometry}** ({first['layers']} layers, d = {first['hidden']}, {first['visual']} visual tokens, "
            f"{first['keep']} kept on average: {first['kept_after_cut']} from layer {first['layer']}; "
            f"{first['method']}; {machine}, {first['date']}):\n\n{markdown(own)}\n"
        )
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the CSV, draw the figures, put the tables between README's marks."""
    parser = argparse.ArgumentParser(description="Make README's section on speed from measurements.")
    parser.add_argument("--csv", type=Path, default=Path("eval/results/bench.csv"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args(argv)
    with options.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = section(rows, options.csv.parent)
    before, mark, rest = options.readme.read_text().partition(MARKS[0])
    if not mark:
        raise SystemExit(f"{options.readme} has no {MARKS[0]}")
    options.readme.write_text(f"{before}{mark}\n{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    print(text)


if __name__ == "__main__":
    main()
