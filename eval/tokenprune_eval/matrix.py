"""What works, family by family: the oracle's tests run, and a table made of their outcomes.

    python -m tokenprune_eval.matrix --csv eval/results/matrix.csv --page docs/models.md

One file holds several versions of transformers: a run replaces the rows of the version it ran on. A cell is "yes" when
every test behind it passed, "no" when one failed, and empty when the family (or stock generate()) does not have it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from tokenprune import tables
from tokenprune.machine import describe
from tokenprune_eval.publish.__main__ import put

TESTS = ("tests/test_matrix.py", "tests/test_generation.py", "tests/test_backends.py")
# (test, position of the family's name in its parameters, position of what is told apart, its names in the table)
COLUMNS = {
    "test_prefill_and_greedy": (
        0,
        1,
        {
            "one": "one image",
            "several": "several images",
            "ragged": "ragged batch",
            "video": "video",
            "videos": "video",
        },
    ),
    "test_modes": (
        1,
        3,
        {
            "sampling": "sampling",
            "beams": "beams",
            "beams2": "beams",
            "prompt_lookup": "prompt lookup",
            "static": "static cache",
            "no_cache": "no cache",
        },
    ),
    "test_interleaved_conversations": (1, 2, {"batch1": "later turns", "ragged4": "later turns"}),
    "test_flash_emulated": (0, 2, {"1": "flash (emulated)", "3": "flash (emulated)"}),
}
NAMES = list(dict.fromkeys(name for _, _, names in COLUMNS.values() for name in names.values()))
Cell = tuple[str, str]


def outcomes(report: Path) -> dict[Cell, Counter[str]]:
    """(family, column) -> outcomes of the tests behind it, from a JUnit report."""
    found: dict[Cell, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = case.get("name", "").rstrip("]").partition("[")
        if test not in COLUMNS:
            continue
        family, place, names = COLUMNS[test]
        parts = parameters.split("-")
        outcome = "passed"
        for child in case:
            outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}.get(child.tag, outcome)
        found.setdefault((parts[family], names[parts[place]]), Counter())[outcome] += 1
    return found


def rows(found: dict[Cell, Counter[str]]) -> list[dict[str, str]]:
    """One row per family and column, with the machine."""
    machine = describe()
    return [
        {
            "family": family,
            "column": column,
            **{k: str(counts[k]) for k in ("passed", "skipped", "failed")},
            **{k: machine[k] for k in ("transformers", "torch", "cpu", "gpu", "date")},
        }
        for (family, column), counts in found.items()
    ]


def table(records: Iterable[dict[str, str]]) -> str:
    """A Markdown table; where versions differ the cell says so.

    Beside a family's name: the versions in which its stock forward fails, of which there are no rows.
    """
    records = list(records)
    cells: dict[Cell, dict[str, str]] = {}
    runs = {(record["family"], record["transformers"]) for record in records}
    versions = sorted({version for _, version in runs})
    for record in records:
        value = "no" if int(record["failed"]) else "yes" if int(record["passed"]) else ""
        cells.setdefault((record["family"], record["column"]), {})[record["transformers"]] = value
    families = sorted({family for family, _ in cells})
    lines = []
    for family in families:
        texts = []
        for name in NAMES:
            own = cells.get((family, name), {})
            values = {v: own.get(v, "") for v in versions if (family, v) in runs}
            same = set(values.values())
            texts.append(
                same.pop()
                if len(same) == 1
                else ", ".join(f"{v}: {x or '-'}" for v, x in sorted(values.items()))
            )
        fails = [v for v in versions if (family, v) not in runs]
        named = f"{family} (not {', '.join(fails)})" if fails else family
        lines.append([named, *texts])
    return tables.markdown(["", *NAMES], lines, {0: "---"} | dict.fromkeys(range(1, len(NAMES) + 1), ":---:"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tests, keep their outcomes, show the table."""
    parser = argparse.ArgumentParser(description="Make the table of what works.")
    parser.add_argument("--csv", type=Path, help="keep the outcomes here, beside those of other versions")
    parser.add_argument("--page", type=Path, help="put the table between its marks in this file")
    parser.add_argument("--workers", default="2", help="test processes (default: 2)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            options.workers,
            f"--junitxml={report}",
            *TESTS,
        ]
        status = subprocess.run(command, check=False).returncode
        records = rows(outcomes(report))
    if options.csv is not None:
        version = describe()["transformers"]
        records = [r for r in tables.read(options.csv) if r["transformers"] != version] + records
        tables.write(options.csv, records)
    text = table(records)
    if options.page is not None:
        put(options.page, "matrix", text)
    print(text)
    sys.exit(status)


if __name__ == "__main__":
    main()
