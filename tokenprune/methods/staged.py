"""Several methods, one for each cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenprune.errors import ConfigError
from tokenprune.methods.base import Method
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import DecoderShape, Selection

#: What there is one of in a call, whatever the number of cuts.
_SHARED = ("vision", "pixels")


@dataclass(frozen=True)
class Staged(Method):
    """Asks at each cut the method that is named for it; each has needs of its own.

    Args:
        methods: by cut.

    Raises:
        ConfigError: two of them look into the vision tower in different ways, or a later one has a say in counts, or
            looks ahead.
    """

    name: ClassVar[str] = "stages"

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        needs = [method.needs() for method in self.methods]
        for what in _SHARED:
            told = [getattr(own, what) for own in needs if own.sees_tower]
            if any(not _same(told[0], other) for other in told[1:]):
                raise ConfigError(
                    f"stages {', '.join(method.name for method in self.methods)}: {what!r} is wanted in two ways, and "
                    f"there is one of it in a call; give these stages the same parameters"
                )
        for method, own in zip(self.methods[1:], needs[1:], strict=True):
            if own.counts or own.ahead is not None:
                raise ConfigError(f"stage {method.name!r} speaks before the LLM, and is not the first")

    def at(self, cut: int) -> Method:
        return self.methods[cut]

    def needs(self) -> Needs:
        """All that any of them wants."""
        return united([method.needs() for method in self.methods])

    def check(self, shape: DecoderShape) -> None:
        for method in self.methods:
            method.check(shape)

    def select(self, image: ImageTokens, k: int) -> Selection:
        return self.methods[image.cut].select(image, k)

    def reads(self) -> bool:
        return any(method.reads() for method in self.methods)

    def described(self) -> dict[str, Any]:
        return {"stages": [{"method": own.name, **own.described()} for own in self.methods]}


def united(needs: Sequence[Needs]) -> Needs:
    """Needs that cover all of these."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Needs):
        told = [getattr(own, field.name) for own in needs]
        if field.name in ("states", "prompt"):
            found[field.name] = tuple(dict.fromkeys(state for own in told for state in own))
        elif isinstance(field.default, bool):
            found[field.name] = any(told)
        else:
            found[field.name] = next((own for own in told if own is not None), None)
    return Needs(**found)


def _same(a: Any, b: Any) -> bool:
    """Bound methods of equal objects are the same; Python compares the objects by identity."""
    own, other = getattr(a, "__self__", None), getattr(b, "__self__", None)
    if own is not None and other is not None:
        return bool(own == other) and a.__func__ is b.__func__
    return bool(a == b)
