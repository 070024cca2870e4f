"""The testbed's held-out questions as lmms-eval tasks: ``python -m tokenprune_eval.lmms.testbed FOLDER``.

Then ``python -m lmms_eval --include_path FOLDER --tasks tokenprune_testbed ...``, or one family, tokenprune_counting.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tokenprune_testbed import Sample, evaluation_set

TASKS = Path(__file__).with_name("tasks")
GROUP = "tokenprune_testbed"


def write_tasks(folder: Path, questions: int, seed: int = 0) -> list[Sample]:
    """Write the tasks, a group of them, and their data.

    Args:
        folder: made where it is missing; what is in it is overwritten.
        questions: held-out ones, families in equal parts, the two-image differences among them.
        seed: of the questions.

    Returns:
        The same questions, for another evaluator.
    """
    import datasets
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    for name in ("_questions.yaml", "utils.py"):
        shutil.copy(TASKS / name, folder / name)
    samples = evaluation_set(questions, seed=seed)
    families = list(dict.fromkeys(sample.family for sample in samples))
    for family in families:
        own = [s for s in samples if s.family == family]
        path = folder / f"{family}.parquet"
        columns: dict[str, list[Any]] = {
            "images": [[Image.fromarray(image) for image in s.images] for s in own],
            "question": [s.question for s in own],
            "answer": [s.answer for s in own],
        }
        _write_parquet(path, columns)
        task = {"include": "_questions.yaml", "task": task_name(family)}
        task["dataset_kwargs"] = {"data_files": {"test": str(path.resolve())}}  # type: ignore[assignment]
        (folder / f"{family}.yaml").write_text(yaml.safe_dump(task))
    group = (TASKS / "_group.yaml").read_text().replace("TASKS", ", ".join(map(task_name, families)))
    (folder / f"{GROUP}.yaml").write_text(group)
    return samples


def task_name(family: str) -> str:
    """Of a family of questions in lmms-eval."""
    return f"tokenprune_{family}"


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import datasets

    kinds = {name: datasets.Value("string") for name in columns}
    kinds["images"] = datasets.Sequence(datasets.Image())
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(str(path))


def main(argv: Sequence[str] | None = None) -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description="The testbed's questions as lmms-eval tasks.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    samples = write_tasks(options.folder, options.questions, options.seed)
    print(f"{len(samples)} questions in {options.folder}; group {GROUP}")


if __name__ == "__main__":
    main()
