"""The accuracy sections of docs/results.md from committed comparisons.

A comparison comes from `tokenprune compare`; its compare.csv is committed as eval/results/compare_MODEL.csv, that of
every method as methods_MODEL.csv. The same numbers are written for `tokenprune demo`, which asks too few questions to
tell methods apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune import tables
from tokenprune.arguments import AUTO
from tokenprune.compare.arms import CONTROLS, NONE
from tokenprune_testbed import compared

MODELS = ("small", "smol")
LOW = ("0.33", "0.22", "0.11")
#: Where "auto" was measured, by model.
DEFAULT = {"small": "methods_small", "smol": "auto_smol", "unseen": "auto_unseen"}
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
    lines = [[_title(n), *(_cell(found.get((n, budget))) for budget in budgets)] for n in _in_order(rows)]
    return tables.markdown(["", *(f"{float(budget):.0%}" for budget in budgets)], lines)


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


def every_method(comparisons: dict[str, list[Row]]) -> str:
    """Markdown: per model all methods by budget, and what reads; the least budget by family of questions."""
    parts = []
    for model, rows in comparisons.items():
        parts += [
            _head(model, rows).replace(", in brackets its 95 % interval; A: on", "; A: on"),
            _every(rows),
            "",
        ]
        least = min((row["keep"] for row in rows if row["keep"]), key=float)
        parts += [f"`{model}` at {float(least):.0%}, by family of questions:\n", _families(rows, least), ""]
    return "\n".join(parts)


def _every(rows: Sequence[Row]) -> str:
    budgets = sorted({row["keep"] for row in rows if row["keep"]}, key=float, reverse=True)
    lines = []
    for name in _in_order(rows):
        own = {row["keep"]: row for row in rows if row["arm"] == name}
        reads = any(row.get("reads_text") == "yes" for row in own.values())
        cells = [part for budget in budgets for part in _with_difference(own.get(budget))]
        lines.append([_title(name), "yes" if reads else "", *cells])
    titles = [title for budget in budgets for title in (f"{float(budget):.0%}", "minus *uniform*")]
    return tables.markdown(["", "reads the question", *titles], lines, {0: "---", 1: "---"})


def _with_difference(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    if row["refused"]:
        return "out of reach", ""
    if not row.get("minus uniform"):
        return f"{100 * float(row['accuracy']):.1f}", ""
    points, low, high = (float(row[f"minus uniform{end}"]) for end in ("", " low", " high"))
    return f"{100 * float(row['accuracy']):.1f}", f"{points:+.1f} [{low:+.1f}, {high:+.1f}]"


def _families(rows: Sequence[Row], keep: str) -> str:
    names = [n.removeprefix("accuracy ") for n in rows[0] if n.startswith("accuracy ") and n.count(" ") == 1]
    names = [name for name in names if name not in ("low", "high", "questions")]
    whole = next(row for row in rows if row["arm"] == NONE)
    own = {row["arm"]: row for row in rows if row["keep"] == keep and not row["refused"]}
    shown = [("none", whole), *((_title(n), own[n]) for n in _in_order(rows) if n in own)]
    lines = [[title, *(f"{100 * float(row[f'accuracy {n}']):.0f}" for n in names)] for title, row in shown]
    return tables.markdown(["", *names], lines)


def _in_order(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["arm"] for row in rows if row["keep"]))
    return sorted(names, key=lambda name: name in CONTROLS)


def _title(name: str) -> str:
    return f"*{name}*" if name in CONTROLS else f"**{name}**" if name == "auto" else name


def shown(comparisons: dict[str, list[Row]], results: Path) -> list[Row]:
    """What `tokenprune demo` shows of them: a row per model, method and budget."""
    found = [
        {"model": model, "method": _form(row["arm"]), **{name: row[name] for name in compared.COPIED}}
        for model, rows in comparisons.items()
        for row in rows
        if _form(row["arm"]) in compared.METHODS and not row["refused"]
    ]
    known = {(row["model"], row["method"]) for row in found}
    found += [
        {"model": model, "method": AUTO, **{name: row[name] for name in compared.COPIED}}
        for model, name in DEFAULT.items()
        for row in tables.read(results / f"{name}.csv")
        if row["arm"] == AUTO and model in MODELS and (model, AUTO) not in known
    ]
    return found


def default(results: Path, arms: Sequence[str]) -> str:
    """Markdown: "auto" beside controls and what is not tuned, by model and budget."""
    rows = _default(results)
    places = [(model, keep) for model in DEFAULT for keep in LOW]
    lines = [["none", *(_percent(rows[model, NONE, ""]) if keep == LOW[0] else "" for model, keep in places)]]
    for arm in arms:
        found = [rows.get((model, arm, keep)) for model, keep in places]
        untuned = ", untuned" if arm not in (AUTO, *CONTROLS) else ""
        lines.append([f"{_title(arm)}{untuned}", *("" if row is None else _percent(row) for row in found)])
    return tables.markdown(["", *(f"{model} {float(keep):.0%}" for model, keep in places)], lines)


def above(results: Path) -> str:
    """A sentence: by how much "auto" is above the even grid."""
    rows = _default(results)
    told = [
        f"`{model}` {', '.join(_with_difference(rows[model, AUTO, keep])[1] for keep in LOW)}"
        for model in DEFAULT
    ]
    return f"`auto` minus the even grid, paired question by question, in points: {'; '.join(told)}."


def _default(results: Path) -> dict[tuple[str, str, str], Row]:
    """By model, arm and budget."""
    rows: dict[tuple[str, str, str], Row] = {}
    for model, name in DEFAULT.items():
        rows |= {(model, row["arm"], row["keep"]): row for row in tables.read(results / f"{name}.csv")}
        for keep in LOW:  # without a profile it is VFlowOpt's defaults
            rows.setdefault((model, AUTO, keep), rows.get((model, "vflowopt", keep), {}))
    return rows


def read(results: Path, what: str) -> dict[str, list[Row]]:
    """Committed comparisons, by model."""
    found = {}
    for model in MODELS:
        rows = tables.read(results / f"{what}_{model}.csv")
        if rows:
            found[model] = rows
    return found
