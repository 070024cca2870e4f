"""The user's cache folder: what is known about models, and what was converted once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$TOKENPRUNE_CACHE, or tokenprune in the user's cache folder."""
    given = os.environ.get("TOKENPRUNE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenprune"
