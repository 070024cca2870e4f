"""VFlowOpt: one importance map per image, cuts before the LLM and at two depths, and recycling at the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenprune.budget import Cut, Keep
from tokenprune.errors import ConfigError
from tokenprune.methods.base import Choice, Method, ScoreMethod, check_flag
from tokenprune.methods.importance import ImportanceMap
from tokenprune.methods.recycle import HOW, Recycle
from tokenprune.methods.seen import ImageTokens, Needs
from tokenprune.methods.spread import Spread
from tokenprune.space import Dimension, OneOf, Point, Real, Setting, spend, spent_ratios
from tokenprune.tokens import Selection

RECYCLING = Choice((*HOW.values, "none"))


@dataclass(frozen=True)
class VFlowOpt(Method):
    """Keeps what the vision tower finds important; blind to the text.

    The score is `ImportanceMap`'s, the merging at the first cut that of `Recycle`, the even grid that of `Spread`.
    Default cuts: before the LLM, at L // 3 and at 2 (L // 3), keeping R1, R1 R2 and, solved from the budget, R1 R2 R3
    of an image's tokens.

    Paper: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization", arXiv
    2508.05211. Its five numbers are tuned per model and budget: these defaults are not. The paper recycles by cells and
    has neither an even grid nor a size term (`recycling="cells", even=0.0, size_term=False`); on both testbeds and at
    every budget the defaults here drift less, and the size term is worth most of it (eval/results/ablations_small.csv).

    Args:
        t, alpha, voters: of the importance map.
        recycling: "hopfield", "cells" or "none": what becomes of the tokens that the first cut drops, see `Recycle`.
        a: side of cells, in tokens.
        beta: inverse temperature of "hopfield".
        even: share of the tokens kept that lie on an even grid.
        r1: share kept by the first cut; None: 1.2 times the budget.
        r2: share of those kept by the second; None: 0.9.
        protect_recycled: whether merged tokens stay at later cuts.
        recycle_every: whether later cuts merge what they drop, too; with "hopfield".
        size_term: whether the log of their sizes is added to attention logits; flash attention cannot.
    """

    name: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = "arXiv 2508.05211"

    t: float = 0.0
    alpha: float = 0.0
    voters: str = "attended"
    recycling: str = "hopfield"
    a: float = 4.0
    beta: float = 100.0
    even: float = 0.5
    r1: float | None = None
    r2: float | None = None
    protect_recycled: bool = False
    recycle_every: bool = False
    size_term: bool = True

    def __post_init__(self) -> None:
        RECYCLING.check("recycling", self.recycling)
        for name in ("protect_recycled", "recycle_every", "size_term"):
            check_flag(name, getattr(self, name))
        _ = self.chooser  # checks what is its own
        for name in ("r1", "r2"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, float) or not 0 < value <= 1
            ):
                raise ConfigError(f"{name} must be a float in (0, 1], not {value!r}")

    @property
    def chooser(self) -> Recycle | ScoreMethod:
        """The map, and what merges around it."""
        chooser: ScoreMethod = ImportanceMap(self.t, self.alpha, self.voters)
        if self.even != 0:
            chooser = Spread(chooser, self.even)
        if self.recycling == "none":
            return chooser
        return Recycle(
            chooser,
            self.a,
            self.protect_recycled,
            self.size_term,
            self.recycling,
            self.beta,
            self.recycle_every,
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

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension] | None:
        """The paper's numbers (t, alpha, a; R1 and R2 as `spend` reads them), recycling, the grid."""
        space = cls.first_space(setting)
        if space is None or setting.num_layers < 3:
            return space
        first = spent_ratios((0, setting.num_layers // 3), (1.2,), setting)[0]
        return {**space, "first": Real(0.0, 1.0, first), "second": Real(0.0, 1.0, 0.5)}

    @classmethod
    def first_space(cls, setting: Setting) -> dict[str, Dimension] | None:
        """What a search may vary of the first cut; None where the tower cannot be looked into."""
        if setting.attention_peak is None:
            return None
        side = float(min(24, max(2, setting.grid_side)))
        space: dict[str, Dimension] = {
            "t": Real(0.0, max(1.0, setting.attention_peak), 0.0),
            "alpha": Real(-1.0, 1.0, 0.0),
            # Merged tokens lose to dropped ones where their sizes cannot be told.
            "recycling": OneOf(HOW.values if setting.biases else RECYCLING.values),
            "a": Real(1.0, side, min(4.0, side)),
            "even": Real(0.0, 1.0, 0.5),
        }
        if setting.biases:
            space["size_term"] = OneOf((True, False))
        return space

    @classmethod
    def first_at(cls, point: Point) -> dict[str, Any]:
        """A point of `first_space` as parameters."""
        own: dict[str, Any] = {name: point[name] for name in ("t", "alpha", "recycling", "even")}
        own["size_term"] = point.get("size_term", False)
        if own["recycling"] == "cells":
            own["a"] = point["a"]
        return own

    @classmethod
    def arguments_at(cls, point: Point, setting: Setting) -> dict[str, Any]:
        own = cls.first_at(point)
        if "first" not in point:
            return own
        third = setting.num_layers // 3
        ratios = [float(point["first"]), float(point["second"])]
        return {**own, "cuts": spend((0, third, 2 * third), ratios, setting)}

    def select(self, image: ImageTokens, k: int) -> Selection:
        return self.chooser.select(image, k)


def _times(keep: Keep, factor: float) -> Keep:
    return max(1, round(keep * factor)) if isinstance(keep, int) else min(1.0, keep * factor)
