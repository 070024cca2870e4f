"""README's accuracy section from committed comparisons: ``python -m tokenprune_eval.accuracy --readme README.md``.

A comparison comes from `tokenprune compare`; its compare.csv is committed as eval/results/compare_MODEL.csv. With
``--demo`` the same numbers are written for `tokenprune demo`, which asks too few questions to tell methods apart.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from tokenprune.compare.arms import CONTROLS, NONE
from tokenprune.testbed import compared

RESULTS = Path("eval/results")
MODELS = ("small", "smol")
MARKS = ("<!-- accuracy: begin -->", "<!-- accuracy: end -->")
Row = dict[str, str]


def section(comparisons: dict[str, list[Row]]) -> str:
    """Markdown: a table per model, then where each method loses to a control."""
    parts = []
    for model, rows in comparisons.items():
        parts += [_head(model, rows), _table(rows), ""]
    parts.append(
        "Where a method loses to a control (the whole 95 % interval of the paired difference is below zero):\n"
    )
    for name in _methods(comparisons):
        parts.append(f"* `{name}`: {_losses(name, comparisons)}.")
    return "\n".join(parts)


def _head(model: str, rows: Sequence[Row]) -> str:
    whole = next(row for row in rows if row["arm"] == NONE)
    gpu = whole.get("gpu") or whole["cpu"]
    return (
        f"`{model}`, {whole['questions']} held-out questions, unpruned {_percent(whole)} % right ({gpu}, "
        f"{whole['date']}): accuracy in %, in brackets its 95 % interval; A: on the questions a smaller picture gets "
        f"wrong.\n"
    )


def _table(rows: Sequence[Row]) -> str:
    budgets = sorted({row["keep"] for row in rows if row["keep"]}, key=float, reverse=True)
    found = {(row["arm"], row["keep"]): row for row in rows}
    names = list(dict.fromkeys(row["arm"] for row in rows if row["keep"]))
    names.sort(key=lambda name: name in CONTROLS)
    lines = [
        "| | " + " | ".join(f"{float(budget):.0%}" for budget in budgets) + " |",
        "|---|" + "---:|" * len(budgets),
    ]
    for name in names:
        cells = [_cell(found.get((name, budget))) for budget in budgets]
        title = f"*{name}*" if name in CONTROLS else f"**{name}**" if name == "auto" else name
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["refused"]:
        return "out of reach"
    group = f", A {100 * float(row['group_a']):.0f}" if row["group_a"] else ""
    return f"{_percent(row)}{group}"


def _percent(row: Row) -> str:
    value, low, high = (100 * float(row[name]) for name in ("accuracy", "accuracy low", "accuracy high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _methods(comparisons: dict[str, list[Row]]) -> list[str]:
    """Method names, whatever the layer that was given beside them."""
    names = [row["arm"] for rows in comparisons.values() for row in rows if row["keep"]]
    return [name for name in dict.fromkeys(map(_form, names)) if name not in CONTROLS]


def _form(name: str) -> str:
    return ",".join(part for part in name.split(",") if not part.startswith("layer="))


def _losses(name: str, comparisons: dict[str, list[Row]]) -> str:
    said = []
    for model, rows in comparisons.items():
        own = [row for row in rows if row["keep"] and _form(row["arm"]) == name and not row["refused"]]
        for row in own:
            lost = [c for c in CONTROLS if row.get(f"minus {c} high") and float(row[f"minus {c} high"]) < 0]
            if lost:
                said.append(f"{model} at {float(row['keep']):.0%} to {', '.join(lost)}")
    return "; ".join(said) if said else "nowhere"


def shown(comparisons: dict[str, list[Row]]) -> list[Row]:
    """What `tokenprune demo` shows of them: a row per model, method and budget."""
    return [
        {"model": model, "method": _form(row["arm"]), **{name: row[name] for name in compared.COPIED}}
        for model, rows in comparisons.items()
        for row in rows
        if _form(row["arm"]) in compared.METHODS and not row["refused"]
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the section, or put it between its marks."""
    parser = argparse.ArgumentParser(description="The accuracy section of the README.")
    parser.add_argument("--readme", type=Path, help="put it between its marks in this file")
    parser.add_argument("--demo", action="store_true", help="write what `tokenprune demo` shows, too")
    options = parser.parse_args(argv)
    comparisons = {}
    for model in MODELS:
        path = RESULTS / f"compare_{model}.csv"
        if not path.exists():
            continue
        with path.open(newline="") as file:
            comparisons[model] = list(csv.DictReader(file))
    if options.demo:
        compared.write(shown(comparisons))
    text = section(comparisons)
    if options.readme is None:
        print(text)
        return
    before, _, rest = options.readme.read_text().partition(MARKS[0])
    options.readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
