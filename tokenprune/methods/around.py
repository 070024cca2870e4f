"""Methods that go around another one, by its name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tokenprune.budget import Cut, Keep
from tokenprune.errors import ConfigError
from tokenprune.methods.base import Method
from tokenprune.methods.registry import make_method
from tokenprune.methods.seen import Needs
from tokenprune.tokens import DecoderShape


@dataclass(frozen=True)
class Around(Method):
    """Asks another method what to keep, where it asks for it, and makes something more of the answer.

    Args:
        of: what chooses: a name, with its defaults, or an instance.
    """

    of: str | Method = "cdpruner"

    def __post_init__(self) -> None:
        if isinstance(self.chooser, Around):
            raise ConfigError(
                f"{self.name} goes around a method that chooses, not around {self.chooser.name}"
            )

    @cached_property
    def chooser(self) -> Method:
        """The method that chooses."""
        return make_method(self.of, {})

    def needs(self) -> Needs:
        return self.chooser.needs()

    def reads(self) -> bool:
        return self.chooser.reads()

    def check(self, shape: DecoderShape) -> None:
        self.chooser.check(shape)

    def default_cuts(
        self, family: str, num_layers: int, keep: Keep | None = None
    ) -> tuple[tuple[Cut, ...], str]:
        return self.chooser.default_cuts(family, num_layers, keep)
