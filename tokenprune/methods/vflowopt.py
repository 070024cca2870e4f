"""VFlowOpt: one importance map per image, cuts before the LLM and at two depths, and recycling at the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenprune.budget import Cut, Keep
from tokenprune.errors import ConfigError
from tokenprune.methods.base import ImageTokens, Method, Needs
from tokenprune.methods.importance import ImportanceMap
from tokenprune.methods.recycle import Recycle
from tokenprune.tokens import Selection


@dataclass(frozen=True)
class VFlowOpt(Method):
    """Keeps what the vision tower finds important; blind to the text.

    The score is `ImportanceMap`'s, the merging at the first cut that of `Recycle`. Default cuts: before the LLM, at
    L // 3 and at 2 (L // 3), keeping R1, R1 R2 and, solved from the budget, R1 R2 R3 of an image's tokens.

    Paper: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization", arXiv
    2508.05211. Its five numbers are tuned per model and budget: these defaults are not.

    Args:
        t, alpha, voters: of the importance map.
        a: side of recycling cells, in tokens; 0 recycles nothing.
        r1: share kept by the first cut; None: 1.2 times the budget.
        r2: share of those kept by the second; None: 0.9.
        protect_recycled: whether merged tokens stay at later cuts.
        size_term: whether the log of their sizes is added to attention logits.
    """

    name: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = "arXiv 2508.05211"

    t: float = 0.0
    alpha: float = 0.0
    voters: str = "attended"
    a: float = 4.0
    r1: float | None = None
    r2: float | None = None
    protect_recycled: bool = False
    size_term: bool = False

    def __post_init__(self) -> None:
        _ = self.chooser  # checks what is its own
        for name in ("r1", "r2"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, float) or not 0 < value <= 1
            ):
                raise ConfigError(f"{name} must be a float in (0, 1], not {value!r}")

    @property
    def chooser(self) -> Recycle | ImportanceMap:
        """The map, and what merges around it."""
        importance = ImportanceMap(self.t, self.alpha, self.voters)
        return (
            Recycle(importance, self.a, self.protect_recycled, self.size_term) if self.a != 0 else importance
        )

    def needs(self) -> Needs:
        return self.chooser.needs()

    def default_cuts(
        self, family: str, num_layers: int, keep: Keep | None = None
    ) -> tuple[tuple[Cut, ...], str]:
        third = num_layers // 3
        if not third:
            return (Cut(0),), "the model has less than three layers"
        layers = (0, third, 2 * third)
        if keep is None:
            return tuple(map(Cut, layers)), "L / 3"
        first = self.r1 if self.r1 is not None else _times(keep, 1.2)
        # The second keeps enough that the third, which keeps no more, can still meet the average.
        rest = num_layers - third
        second = _times(first, 0.9 if self.r2 is None else self.r2)
        if self.r2 is None and isinstance(keep, float) and isinstance(first, float):
            second = min(first, max(second, (num_layers * keep - third * first) / rest))
        return tuple(map(Cut, layers, (first, second, None))), "L / 3"

    def select(self, image: ImageTokens, k: int) -> Selection:
        return self.chooser.select(image, k)


def _times(keep: Keep, factor: float) -> Keep:
    return max(1, round(keep * factor)) if isinstance(keep, int) else min(1.0, keep * factor)
