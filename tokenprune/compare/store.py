"""A comparison on disk: what was asked, and a line per answer and per time, so that a kill loses one batch at most."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenprune.errors import ConfigError

ASKED, LINES = "asked.json", "lines.jsonl"


class Store:
    """Args:
    folder: made where it is missing.
    asked: what decides the answers: another comparison is refused.
    resume: go on with what is there.

    Raises:
        ConfigError: something is there and `resume` was not asked for, or it is of another comparison.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.path = folder, folder / LINES
        held = folder / ASKED
        if self.path.exists() and not resume:
            raise ConfigError(
                f"there is a comparison in {str(folder)!r} already: go on with --resume, or name another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if held.exists() and self.path.exists():
            differ = _differences(json.loads(held.read_text()), json.loads(json.dumps(asked)))
            if differ:
                raise ConfigError(
                    f"the comparison in {str(folder)!r} was asked something else ({', '.join(differ)}); name another"
                )
        held.write_text(json.dumps(asked, indent=1))
        self._mend()

    def add(self, kind: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; they are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"kind": kind, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self, kind: str) -> Iterator[dict[str, Any]]:
        """What was added under a kind, in order."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row.pop("kind") == kind:
                    yield row

    def _mend(self) -> None:
        """Cut off a last line that a kill left unfinished."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with self.path.open("r+b") as file:
                file.truncate(end)


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*held, *asked} if held.get(name) != asked.get(name))
