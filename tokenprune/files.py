"""Paths that people give."""

from __future__ import annotations

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
