"""Results on disk: one CSV of rows and one of per-question outcomes, written row by row, readable after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tokenprune import tables
from tokenprune.errors import ConfigError

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
        self.bits = {row["key"]: row["correct"] for row in tables.read(self.correct_path)}
        self.rows = {row["key"]: row for row in tables.read(self.path)}
        try:
            if self.path.exists():
                tables.check(self.path, self.columns)
        except ConfigError as error:
            raise SystemExit(str(error)) from None

    def add(self, row: dict[str, str], correct: Sequence[bool] | None = None) -> None:
        """Append a row, and its outcomes where it has any."""
        if correct is not None:
            self.bits[row["key"]] = pack(correct)
            tables.append(self.correct_path, {"key": row["key"], "correct": pack(correct)})
        self.rows[row["key"]] = row
        tables.append(self.path, dict.fromkeys(self.columns, "") | row)

    def correct(self, key: str) -> BoolArray:
        """Per-question outcomes of a row."""
        return unpack(self.bits[key], int(self.rows[key]["questions"]))


def pack(correct: Sequence[bool]) -> str:
    """Outcomes as a hexadecimal bit mask, the first question in the highest bit."""
    return np.packbits(np.asarray(correct, dtype=bool)).tobytes().hex()


def unpack(text: str, n: int) -> BoolArray:
    """The n outcomes `pack` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:n].astype(bool)
