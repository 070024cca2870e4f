"""Methods by name: ours, and those that installed packages register."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import entry_points
from typing import Any

from tokenprune.errors import ConfigError
from tokenprune.methods.base import Method
from tokenprune.named import build

#: By name; `tokenprune.methods` puts ours in.
METHODS: dict[str, type[Method]] = {}

#: Where other packages register methods: an entry point of this group whose name is the method's.
GROUP = "tokenprune.methods"


def find_method(name: str) -> type[Method] | None:
    """The method of that name, ours or an installed package's; None: there is none.

    "package.module:Class" names one that nobody has registered: its module is imported, from the current folder too,
    and it is known by its own name from then on. Only what a user says gets here; names in profiles hold no colon
    (`profiles.profile.Name`).

    Raises:
        ConfigError: the entry point is no method, or one of another name; the module cannot be imported.
    """
    if ":" in name:
        return _imported(name)
    if name not in METHODS:
        for entry in entry_points(group=GROUP, name=name):
            found = entry.load()
            if not (
                isinstance(found, type) and issubclass(found, Method) and getattr(found, "name", "") == name
            ):
                raise ConfigError(
                    f"the entry point {entry.value!r} of {GROUP} is no Method of the name {name!r}"
                )
            METHODS[name] = found
    return METHODS.get(name)


def _imported(name: str) -> type[Method]:
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: object = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module of somebody's raises
        raise ConfigError(
            f"cannot take method {name!r}: {type(error).__name__}: {' '.join(str(error).split())[:200]}; it is "
            f"'package.module:Class'"
        ) from error
    finally:
        sys.path.remove(here)
    if not (isinstance(found, type) and issubclass(found, Method)) or not isinstance(
        getattr(found, "name", None), str
    ):
        raise ConfigError(f"{name!r} is no Method with a name; subclass tokenprune.methods.ScoreMethod")
    if METHODS.setdefault(found.name, found) is not found:
        raise ConfigError(
            f"{name!r} calls itself {found.name!r}, as another method does; give it a name of its own"
        )
    return found


def find_all() -> dict[str, type[Method]]:
    """All methods by name, those of installed packages among them."""
    for entry in entry_points(group=GROUP):
        find_method(entry.name)
    return METHODS


def make_method(method: str | Method, parameters: dict[str, Any]) -> Method:
    """Build a method from its name and parameters, or check and return an instance.

    Raises:
        ConfigError: an unknown name or parameter, or a value the method refuses.
    """
    if isinstance(method, Method):
        if parameters:
            raise ConfigError(f"{', '.join(parameters)}: set on the method instance you pass, not beside it")
        return method
    cls = find_method(method) if isinstance(method, str) else None
    if cls is None:
        raise ConfigError(
            f"unknown method {method!r}; choose one of {', '.join(sorted(METHODS))}, or pass a Method"
        )
    return build("method", cls.name, cls, parameters)
