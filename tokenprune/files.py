"""Paths that people give, and files that are whole or not there."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from tokenprune.errors import ConfigError


def given_path(given: str | Path) -> Path:
    """A path somebody gave, `~` expanded. Whether there is anything is for the caller to ask.

    Raises:
        ConfigError: the system will not even look it up (too long, no such user, not readable, a NUL in it).
    """
    try:
        path = Path(given).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the path {str(given)[:80]!r} cannot be used: {reason}") from None
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a reader never sees half of it; a failure leaves nothing.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        # Not tempfile: others may read what the umask lets them.
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file. A pipe would be waited for, and a device never ends.

    Raises:
        ConfigError: it is no regular file, or larger than `most` bytes.
        OSError: it cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is no regular file; give the file itself")
    if found.st_size > most:
        raise ConfigError(f"{path} is too large: {found.st_size:,} bytes, and it may have {most:,}")
    with path.open("rb") as file:
        return file.read(most + 1)
