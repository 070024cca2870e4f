"""Results on disk: one CSV of rows and one of per-question outcomes, written row by row, readable after a kill."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tokenprune.files import write_whole

BoolArray = npt.NDArray[np.bool_]


class Rows:
    """Rows by key.

    A row's outcomes are written before the row itself, so that a row that is there is complete. A line that a
    kill cut short is dropped when the file is read.

    Args:
        path: of the table; the outcomes lie beside it as NAME_correct.csv.
        columns: of the table.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)
        self.correct_path = path.with_name(f"{path.stem}_correct{path.suffix}")
        self.rows: dict[str, dict[str, str]] = {}
        self.bits: dict[str, str] = {}

    def load(self) -> None:
        """Read both files; missing ones are empty.

        Raises:
            SystemExit: the table has other columns.
        """
        if self.path.exists():
            with self.path.open(newline="") as file:
                header = next(csv.reader(file), None)
            if header is not None and header != self.columns:
                raise SystemExit(
                    f"{self.path} has other columns; move it away, or name another file with --csv"
                )
        self.bits = {row["key"]: row["correct"] for row in _complete(self.correct_path)}
        self.rows = {row["key"]: row for row in _complete(self.path)}

    def add(self, row: dict[str, str], correct: Sequence[bool] | None = None) -> None:
        """Append a row, and its outcomes where it has any."""
        if correct is not None:
            self.bits[row["key"]] = pack(correct)
            _append(self.correct_path, ["key", "correct"], {"key": row["key"], "correct": pack(correct)})
        self.rows[row["key"]] = row
        _append(self.path, self.columns, row)

    def correct(self, key: str) -> BoolArray:
        """Per-question outcomes of a row."""
        return unpack(self.bits[key], int(self.rows[key]["questions"]))


def pack(correct: Sequence[bool]) -> str:
    """Outcomes as a hexadecimal bit mask, the first question in the highest bit."""
    return np.packbits(np.asarray(correct, dtype=bool)).tobytes().hex()


def unpack(text: str, n: int) -> BoolArray:
    """The n outcomes `pack` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:n].astype(bool)


def _complete(path: Path) -> list[dict[str, str]]:
    """Rows of a file; what follows its last newline was cut short by a kill, and is taken off."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_whole(path, whole)
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row and None not in row.values()]


def _append(path: Path, columns: Sequence[str], row: dict[str, str]) -> None:
    fresh = not path.exists() or not path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
