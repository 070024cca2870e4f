"""A comparison as CSV and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune import tables
from tokenprune.compare.summary import Row, Share, Summary


def write_csv(summary: Summary, path: Path, about: Mapping[str, str]) -> None:
    """One line per arm. `about` (model, machine, date) stands in every line."""
    tables.write(path, [{**_flat(row, summary), **about} for row in summary.rows])


def write_json(summary: Summary, path: Path, about: Mapping[str, str]) -> None:
    """Everything that was counted, and every answer."""
    rows = [
        {
            **{f.name: _plain(getattr(row, f.name)) for f in dataclasses.fields(row) if f.name != "times"},
            "times": [dict(time) for time in row.times.values()],
        }
        for row in summary.rows
    ]
    questions = [{"text": q.text, "answers": q.answers, "family": q.family} for q in summary.questions]
    document = {"about": dict(about), "rows": rows, "questions": questions, "answers": summary.answers}
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def _flat(row: Row, summary: Summary) -> dict[str, str]:
    flat = {
        "arm": row.name,
        "keep": "" if row.keep is None else f"{row.keep:g}",
        "refused": row.refused,
        "questions": str(len(summary.questions)),
    }
    if row.refused:
        return flat
    flat["reads_text"] = "yes" if row.setting.get("reads_text") else ""
    flat |= {name: f"{getattr(row, name):.6g}" for name in ("kept", "kv", "kv_share", "flops", "drift")}
    shares = {"accuracy": row.accuracy, "loyalty": row.loyalty, "group_a": row.group_a}
    for name, share in {**shares, **{f"accuracy {f}": s for f, s in row.families.items()}}.items():
        flat |= _share(name, share)
    for name, found in row.against.items():
        flat[f"minus {name}"] = f"{found.points:.2f}"
        flat |= {f"minus {name} {bound}": f"{getattr(found, bound):.4g}" for bound in ("low", "high", "p")}
    for (batch_size, what), time in row.times.items():
        flat |= {
            f"{what} x{batch_size} {name}": f"{time[name]:.4g}" for name in ("ms", "speedup", "p20", "p80")
        }
    flat["setting"] = json.dumps(row.setting, sort_keys=True)
    return flat


def _share(name: str, share: Share | None) -> dict[str, str]:
    if share is None:
        return {name: "", f"{name} low": "", f"{name} high": "", f"{name} questions": ""}
    bounds = {f"{name} low": share.low, f"{name} high": share.high}
    return {
        name: f"{share.value:.4f}",
        **{n: f"{v:.4f}" for n, v in bounds.items()},
        f"{name} questions": str(share.total),
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(own) for name, own in value.items()}
    return value
