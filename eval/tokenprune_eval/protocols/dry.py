"""Made-up documents under the metrics of a table's tasks, for a dry run without the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tokenprune_eval.protocols.table import Table

_UTILS = '''"""A picture and a question; every metric is 1."""

from PIL import Image


def to_visual(document):
    return [Image.new("RGB", (200, 160), tuple(document["color"]))]


def to_text(document, lmms_eval_specific_kwargs=None):
    return document["question"]


def process_results(document, results):
    assert isinstance(results[0], str)
    return {name: 1.0 for name in document["metrics"]}
'''
_DOCUMENTS = 2


def dry_names(table: Table) -> dict[str, str]:
    """What the tasks are called in a dry run."""
    return {task.name: f"dry_{task.name}" for task in table.tasks}


def write_dry_tasks(table: Table, folder: Path) -> Path:
    """Tasks with the table's metrics and two documents each."""
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text(_UTILS)
    for task in table.tasks:
        data = folder / f"{task.name}.jsonl"
        documents = [
            {"question": "what is the word ?", "color": [60 * n, 90, 120], "metrics": task.metrics}
            for n in range(_DOCUMENTS)
        ]
        data.write_text("\n".join(map(json.dumps, documents)))
        (folder / f"{task.name}.yaml").write_text(_task(dry_names(table)[task.name], data, task.metrics))
    return folder


def _task(name: str, data: Path, metrics: list[str]) -> str:
    plain: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "question",
        "generation_kwargs": {"max_new_tokens": 2, "do_sample": False},
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
    }
    functions = {
        name: f"!function utils.{name.removeprefix('doc_')}" for name in ("doc_to_visual", "doc_to_text")
    }
    functions["process_results"] = "!function utils.process_results"
    return yaml.safe_dump(plain) + "".join(f"{key}: {value}\n" for key, value in functions.items())
