"""A comparison on disk: what was asked, and a line per answer and per time, so that a kill loses one batch at most."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenprune.errors import ConfigError
from tokenprune.files import write_whole

ASKED, LINES = "asked.json", "lines.jsonl"
# What a line of each kind has at least: one that lacks it was damaged.
_KINDS = {
    "asked": ("asked",),
    "arm": ("arm", "setting"),
    "answer": ("arm", "question", "text", "kept", "kv", "flops", "drift"),
    "refused": ("arm", "reason"),
    "time": ("arm", "batch_size", "what"),
}


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
        if self.path.exists():
            differ = _differences(self._asked(held), json.loads(json.dumps(asked)))
            if differ:
                raise ConfigError(
                    f"the comparison in {str(folder)!r} was asked something else ({', '.join(differ)}); name another"
                )
            self._mend()
        write_whole(held, json.dumps(asked, indent=1))
        if not any(True for _ in self.rows("asked")):
            self.add("asked", [{"asked": dict(asked)}])

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
        with self.path.open("rb") as file:
            for line in file:
                row = _row(line)
                if row is not None and row.pop("kind") == kind:
                    yield row

    def _asked(self, held: Path) -> Mapping[str, Any]:
        """What the answers there were asked, which stands with them, too.

        Raises:
            ConfigError: both are damaged.
        """
        asked = _document(held.read_bytes()) if held.exists() else None
        if asked is None:
            asked = next((row["asked"] for row in self.rows("asked")), None)
        if not isinstance(asked, dict):
            raise ConfigError(
                f"{str(held)!r} is damaged, and nothing else says what its answers were asked; name another folder"
            )
        return asked

    def _mend(self) -> None:
        """Leave out lines that a kill or a power cut damaged: what they held is asked again."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if _row(line) is not None]
        if len(whole) < len(lines):
            write_whole(self.path, b"".join(whole).decode())


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's row; None where it is damaged."""
    row = _document(line) if line.endswith(b"\n") else None
    needed = _KINDS.get(row["kind"]) if row is not None and isinstance(row.get("kind"), str) else None
    return row if needed is not None and row is not None and row.keys() >= set(needed) else None


def _document(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except ValueError:  # no JSON, or no text at all
        return None
    return found if isinstance(found, dict) else None


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*held, *asked} if held.get(name) != asked.get(name))
