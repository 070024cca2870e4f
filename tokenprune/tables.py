"""Tables of measurements on disk: a CSV that grows by a row at a time and is readable after a kill."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenprune.errors import ConfigError
from tokenprune.files import write_whole


def read(path: Path) -> list[dict[str, str]]:
    """Rows; none where there is no file. What follows its last newline was cut short by a kill, and is taken off."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_whole(path, whole)
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row and None not in row.values()]


def append(path: Path, row: Mapping[str, str]) -> None:
    """Add a row to a CSV.

    Raises:
        ConfigError: the file has other columns, or its last line is not whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or not path.stat().st_size
    ended = fresh or check(path, list(row))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        if not ended:
            file.write("\n")
        writer.writerow({name: csv_text(text) for name, text in row.items()})


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A table anew, of all columns that a row has; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_text(str(value)) for name, value in row.items()} for row in rows)


def check(path: Path, columns: Sequence[str] | None = None) -> bool:
    """Refuse a file that rows cannot be added to, before anything is measured for it.

    Args:
        path: of an existing file.
        columns: it must have; None: whichever.

    Returns:
        Whether its last line ends.

    Raises:
        ConfigError: it is no table of these columns, or its last line is not whole.
    """
    with path.open(newline="") as file:
        text = file.read()
    rows = list(csv.reader(text.splitlines(keepends=True)))
    if columns is not None and (rows[0] if rows else None) != list(columns):
        raise ConfigError(f"{path} has other columns; move it away or name another file with --csv")
    if rows and len(rows[-1]) != len(rows[0]):
        raise ConfigError(
            f"the last line of {path} is not whole; complete or remove it, or name another file"
        )
    return text.endswith("\n")


def markdown(
    columns: Sequence[str], rows: Iterable[Sequence[str]], align: Mapping[int, str] = {0: "---"}
) -> str:
    """A table for a page.

    Args:
        columns: their titles.
        rows: their cells.
        align: by the number of a column; the others are numbers, on the right.
    """
    head = "| " + " | ".join(columns).lstrip() + " |"
    rule = "|" + "|".join(align.get(i, "---:") for i in range(len(columns))) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(row) + " |" for row in rows)])


_FORMULA = re.compile(r"[=+\-@\t\r]")


def csv_text(text: str) -> str:
    """A text for a cell of a table, so that no spreadsheet takes it for a formula; numbers stay as they are."""
    if not _FORMULA.match(text):
        return text
    try:
        float(text)
    except ValueError:
        return "'" + text
    return text
