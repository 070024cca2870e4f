"""Put the tables of speed and accuracy between their marks in README and docs, and draw the figures.

``python -m tokenprune_eval.publish`` reads ``eval/results`` alone: `tokenprune bench --csv` and `tokenprune compare`
make what is there. The README's picture and its report are made by ``publish.picture`` and ``publish.sample``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from tokenprune.arguments import AUTO
from tokenprune_eval.publish import accuracy, speed
from tokenprune_testbed import compared

PARTS = ("speed", "accuracy")


def put(path: Path, name: str, text: str) -> None:
    """Between the marks of this name in a file.

    Raises:
        SystemExit: it has none.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, mark, rest = path.read_text().partition(begin)
    if not mark:
        raise SystemExit(f"{path} has no {begin}")
    path.write_text(f"{before}{mark}\n{text.rstrip()}\n{end}{rest.partition(end)[2]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Publish what is committed."""
    parser = argparse.ArgumentParser(description="Write the numbers of README and docs.")
    parser.add_argument("parts", nargs="*", metavar=f"{{{','.join(PARTS)}}}", help="(default: both)")
    parser.add_argument("--results", type=Path, default=Path("eval/results"))
    parser.add_argument("--bench", type=Path, help="(default: bench.csv of the results)")
    parser.add_argument("--root", type=Path, default=Path(), help="where README.md and docs/ are")
    options = parser.parse_args(argv)
    docs = options.root / "docs"
    for part in options.parts or PARTS:
        if part == "speed":
            with (options.bench or options.results / "bench.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            put(options.root / "README.md", "speed", speed.summary(speed.headline(rows)))
            put(docs / "performance.md", "summary", speed.summary(rows))
            put(docs / "performance.md", "speed", speed.section(rows, options.results))
            print(speed.summary(rows))
        elif part == "accuracy":
            comparisons = accuracy.read(options.results, "compare")
            compared.write(accuracy.shown(comparisons, options.results))
            put(options.root / "README.md", "default", accuracy.default(options.results, (AUTO, "uniform")))
            beside = (AUTO, "uniform", "random", "vflowopt", "merge", "merge,of=divprune")
            told = [accuracy.default(options.results, beside), "", accuracy.above(options.results)]
            put(docs / "results.md", "default", "\n".join(told))
            put(docs / "results.md", "accuracy", accuracy.section(comparisons))
            put(
                docs / "results.md",
                "methods",
                accuracy.every_method(accuracy.read(options.results, "methods")),
            )
        else:
            raise SystemExit(f"there is no part {part!r}; give {' or '.join(PARTS)}")


if __name__ == "__main__":
    main()
