"""Dataclasses that users name, with parameters of theirs: methods and estimators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from tokenprune.errors import ConfigError

Made = TypeVar("Made")


def build(kind: str, name: str, cls: type[Made], parameters: Mapping[str, Any]) -> Made:
    """A dataclass with parameters that a user gave.

    Args:
        kind, name: what errors call it: "method", "fastv".
        cls: the dataclass.
        parameters: by name.

    Raises:
        ConfigError: an unknown parameter, or a value the class refuses.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [own for own in parameters if own not in known]
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"{kind} {name!r} has no parameter {', '.join(map(repr, unknown))}; {has}")
    return cls(**parameters)
