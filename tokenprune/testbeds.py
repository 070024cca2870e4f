"""Models that come with questions of their own, out of distributions beside this one.

Such a distribution names them in its entry points, group ``tokenprune.testbeds``; they are then model names on the
command line, and their questions the data sets "testbed" and "testbed:NAME". `tokenprune-testbed`, in ``eval/`` of the
repository, brings "small", "smol" and "pages".
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from tokenprune.errors import ConfigError

GROUP = "tokenprune.testbeds"
OURS = ("small", "smol", "pages")
INSTALL = "pip install './eval' in a clone of the repository (make does it)"
_SOURCE = "testbed"


class Sample(Protocol):
    """A question about pictures, with its answer.

    Attributes:
        images: (h, w, 3) uint8 each.
        question, answer: texts.
        family: the kind of question.
    """

    images: Any
    question: str
    answer: str
    family: str


class Testbed(Protocol):
    """A trained model and what it can be asked."""

    def load(self, dtype: Any = None) -> tuple[Any, Any]:
        """The model, in eval mode on the CPU, and its processor.

        Args:
            dtype: of the weights; None: float32.

        Raises:
            TokenPruneError: something of it is missing; says how to get it.
        """

    def words(self, question: str) -> str:
        """A question as this model reads it.

        Raises:
            ConfigError: it has words that the model does not know.
        """

    def questions(self, count: int, seed: int, *, training: bool = False) -> Sequence[Sample]:
        """So many held-out questions, or such as it was trained on."""


class MissingTestbedError(ConfigError):
    """The testbed's models are asked for and not installed."""


def names() -> tuple[str, ...]:
    """Of the models that are installed."""
    return tuple(entry.name for entry in entry_points(group=GROUP))


def find(name: str) -> Testbed | None:
    """The testbed of this name; None where there is none.

    Raises:
        MissingTestbedError: it is one of ours, which is not installed.
    """
    for entry in entry_points(group=GROUP, name=name):
        found: Testbed = entry.load()
        return found
    if name in OURS:
        raise MissingTestbedError(f"{name!r} is a model of the testbed, which is not installed: {INSTALL}")
    return None


def named_by(source: str) -> Testbed | None:
    """The testbed whose questions a data set's name means: "testbed" (of "small") or "testbed:NAME"; None: another one.

    Raises:
        ConfigError: there is no testbed NAME.
        MissingTestbedError: see `find`.
    """
    head, _, name = source.partition(":")
    if head != _SOURCE:
        return None
    found = find(name or OURS[0])
    if found is None:
        raise ConfigError(
            f"there is no testbed {name!r}; give testbed:NAME with {', '.join(names()) or 'none'}"
        )
    return found
