"""Packages that only a part of this needs: asked for where that part begins, before anything is computed for it."""

from __future__ import annotations

from importlib.util import find_spec

from tokenprune.errors import ConfigError


def install_hint(extra: str) -> str:
    """How the packages of an extra are had: "tokenprune" on PyPI is somebody else's, so from the checkout."""
    return f"pip install '.[{extra}]' in tokenprune's checkout"


def check_installed(what: str, *packages: str, extra: str, instead: str = "") -> None:
    """Refuse what needs packages that are not there.

    Args:
        what: needs them.
        packages: by the names they are imported under.
        extra: of ours that brings them.
        instead: another way, where there is one.

    Raises:
        ConfigError: says which are missing and how they are had.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {', '.join(missing)}: {install_hint(extra)}{instead and '; '}{instead}"
        )
