"""What another method drops, taken up by what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from tokenprune.methods.around import Around
from tokenprune.methods.recycle import Recycle
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class Merge(Around):
    """Another method's choice; at every cut each dropped token goes into the two kept ones most like it.

    The merging is `Recycle`'s "hopfield": weights by softmax(beta cos) of the projected features, a kept token becomes
    the mean of what went into it, and log(size) is added to its attention logits.

    Source: ours. Methods that choose for diversity leave a token near everything that goes; around CDPruner this was
    the least drift of all before the LLM on both testbeds (docs/results.md).

    Args:
        of: what chooses: a name, with its defaults, or an instance.
        size_term: whether the log of their sizes is added to attention logits; flash attention cannot.
        beta: inverse temperature.
    """

    name: ClassVar[str] = "merge"
    paper: ClassVar[str] = "after arXiv 2508.05211"

    size_term: bool = True
    beta: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.recycle  # checks what is its own

    @cached_property
    def recycle(self) -> Recycle:
        """What merges."""
        return Recycle(self.chooser, 1.0, False, self.size_term, "hopfield", self.beta, every=True)

    def needs(self) -> Needs:
        return self.recycle.needs()

    def select(self, image: ImageTokens, k: int) -> Selection:
        return self.recycle.select(image, k)

    def select_all(self, images: Sequence[ImageTokens], counts: Sequence[int]) -> list[Selection]:
        return self.recycle.select_all(images, counts)
