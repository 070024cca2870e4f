"""The accuracy table as Markdown, and what it says in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenprune.compare.statistics import Difference, difference
from tokenprune_eval.results import Results
from tokenprune_testbed import evaluation_set
from tokenprune_testbed.questions import families_of

Row = dict[str, str]


def summarise(results: Results, layers: Sequence[int]) -> str:
    """Markdown: a table per layer, then one paired comparison per variant, layer and control."""
    ok = [row for row in results.rows.values() if row["status"] == "ok"]
    if not ok:
        return "no rows yet"
    first = ok[0]
    scenes: Any = first["scenes"]
    families = families_of(scenes)
    parts = [
        f"{first['questions']} questions, model {first['model']}, {first['cpu']}, {first['threads']} thread(s), torch "
        f"{first['torch']}, transformers {first['transformers']}, {first['date']}. Accuracy in %, with 95 % Wilson "
        f"intervals; random: mean over seeds, with the lowest and highest seed. Retention is the average over decoder "
        f"layers; kept is per image, after the cut. Prefill is one batch of 8 prompts, vision tower included; KV is "
        f"per prompt; FLOPs are the decoder's in prefill, against none."
    ]
    clusters = _scenes(int(first["questions"]), int(first["question_seed"]), scenes)
    for layer in layers:
        here = [row for row in results.rows.values() if row["layer"] in ("", str(layer))]
        if any(row["layer"] for row in here):
            parts += [
                f"**Cut at layer {layer}**",
                _table(here, families),
                _statements(results, layer, clusters),
            ]
    return "\n\n".join(parts)


def compact(results: Results, layers: Sequence[int]) -> str:
    """One Markdown table: accuracy in % by method (rows) and average retention (columns), "/" between layers."""
    ok = [row for row in results.rows.values() if row["status"] == "ok"]
    budgets = sorted({float(row["keep"]) for row in ok if row["keep"]}, reverse=True)
    names = list(dict.fromkeys(label(row) for row in ok if row["keep"]))
    lines = [
        _line(["method", *(f"{100 * budget:.0f} %" for budget in budgets)]),
        _line([":---", *["---:"] * len(budgets)]),
    ]
    for name in names:
        cells = []
        for budget in budgets:
            found = []
            for layer in layers:
                same = [
                    r
                    for r in ok
                    if label(r) == name and r["layer"] == str(layer) and r["keep"] == str(budget)
                ]
                mean = np.mean([100 * float(row["accuracy"]) for row in same]) if same else None
                found.append("-" if mean is None else f"{mean:.1f}")
            cells.append(" / ".join(found))
        lines.append(_line([name, *cells]))
    return "\n".join(lines)


def _scenes(questions: int, seed: int, scenes: Any) -> list[int]:
    """One label per question, equal for questions about one scene."""
    samples = evaluation_set(questions, seed=seed, scenes=scenes)
    labels = {id(s.images[-1]): i for i, s in enumerate(samples)}
    return [labels[id(s.images[-1])] for s in samples]


def label(row: Row) -> str:
    """The method as the table names it; all seeds of random are one."""
    parameters = dict(item.split("=", 1) for item in row["parameters"].split())
    parameters.pop("seed", None)
    return f"{row['method']} ({', '.join(parameters.values())})" if parameters else row["method"]


def _groups(rows: Sequence[Row]) -> dict[tuple[float, str], list[Row]]:
    """Rows by retention (falling) and method; `none` first."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: -float(row["keep"] or 1)):
        groups.setdefault((float(row["keep"] or 1), label(row)), []).append(row)
    return groups


def _table(rows: Sequence[Row], families: Sequence[str]) -> str:
    head = ["retention", "method", "kept", "overall", *families, "prefill ms", "KV KiB", "FLOPs"]
    lines = [_line(head), _line(["---:", ":---", *["---:"] * (len(head) - 2)])]
    for (keep, name), same in _groups(rows).items():
        first = same[0]
        if first["status"] != "ok":
            cells = [f"unreachable (floor {100 * float(first['floor']):.1f} %)"]
            lines.append(_line([f"{100 * keep:.0f} %", name, "", *cells, *[""] * (len(head) - 4)]))
            continue
        accuracy = [_accuracy(same, prefix) for prefix in ("", *(f"{family} " for family in families))]
        kib = f"{float(first['kv_bytes_per_prompt']) / 1024:.0f}"
        prefill = f"{float(first['prefill_ms']):.0f}" if first["prefill_ms"] else ""
        lines.append(
            _line([f"{100 * keep:.0f} %", name, first["kept"], *accuracy, prefill, kib, first["flops_ratio"]])
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _accuracy(same: Sequence[Row], prefix: str) -> str:
    values = [100 * float(row[f"{prefix}accuracy"]) for row in same]
    if len(same) == 1:
        low, high = 100 * float(same[0][f"{prefix}low"]), 100 * float(same[0][f"{prefix}high"])
    else:
        low, high = min(values), max(values)
    return f"{float(np.mean(values)):.1f} [{low:.1f}, {high:.1f}]"


def comparisons(
    results: Results, layer: int, clusters: Sequence[int]
) -> list[tuple[str, str, float, Difference]]:
    """(variant, control, retention, difference): every variant of EntropyPrune against random and uniform."""
    rows = [row for row in results.rows.values() if row["status"] == "ok" and row["layer"] == str(layer)]
    outcomes: dict[tuple[float, str], npt.NDArray[Any]] = {}
    for group, same in _groups(rows).items():
        if all(row["key"] in results.bits for row in same):
            outcomes[group] = np.mean([results.correct(row["key"]) for row in same], axis=0)
    found = []
    for (keep, name), ours in outcomes.items():
        if name.startswith("entropyprune"):
            for control in ("random", "uniform"):
                if (keep, control) in outcomes:
                    found.append((name, control, keep, difference(ours, outcomes[keep, control], clusters)))
    return found


def _statements(results: Results, layer: int, clusters: Sequence[int]) -> str:
    """One line per variant and control: difference in points at each retention, with its verdict."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, control, keep, found in comparisons(results, layer, clusters):
        lines.setdefault((name, control), []).append(_verdict(found, keep))
    if not lines:
        return ""
    head = (
        "Paired differences in accuracy points, with 95 % bootstrap intervals over scenes, each on its own (no "
        "correction for their number); random is the mean of its seeds:"
    )
    return "\n".join(
        [head, "", *(f"* {_pretty(n)} against {c}: {'; '.join(t)}." for (n, c), t in lines.items())]
    )


def _verdict(found: Difference, keep: float) -> str:
    if found.word == "is level with":
        return f"no clear difference at {100 * keep:.0f} % ({found})"
    return f"{'better' if found.word == 'beats' else 'worse'} at {100 * keep:.0f} % ({found})"


def _pretty(name: str) -> str:
    return name.replace("entropyprune", "EntropyPrune")
