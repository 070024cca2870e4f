"""Methods by name: ours, and those that installed packages register."""

from __future__ import annotations

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

    Raises:
        ConfigError: the entry point is no method, or one of another name.
    """
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
