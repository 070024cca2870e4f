"""PyramidDrop: what the prompt's last token attends to, again and again: fewer tokens, the deeper the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from tokenprune.budget import Cut, Keep
from tokenprune.methods.fastv import FastV
from tokenprune.space import Dimension, Setting

_STAGES = 4
_RATIO = 0.5


@dataclass(frozen=True)
class PyramidDrop(FastV):
    """FastV's score at the ends of the first three of four equal stages, each keeping the same share of what is left.

    With L layers the cuts are at L/4, L/2 and 3L/4 and keep r, r^2 and r^3 of an image's tokens; the budget says r:
    (1 + r + r^2 + r^3) / 4 on average. The first quarter is whole, so that an average of 25 % is out of reach.

    Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", arXiv
    2410.17247, section 3.2 (r = 0.5, layers 8, 16 and 24 of 32: 46.9 %). Its code ranks by the last instruction token,
    mean over heads, and so does this.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "arXiv 2410.17247"
    published_layers: ClassVar[Mapping[str, int]] = MappingProxyType({})

    @classmethod
    def search_space(cls, setting: Setting) -> Mapping[str, Dimension] | None:  # type: ignore[override]
        return None  # its cuts are its own

    def default_cuts(
        self, family: str, num_layers: int, keep: Keep | None = None
    ) -> tuple[tuple[Cut, ...], str]:
        layers = [max(1, round(i * num_layers / _STAGES)) for i in range(1, _STAGES)]
        layers = [layer for layer in dict.fromkeys(layers) if layer < num_layers]
        if keep is None:
            return tuple(map(Cut, layers)), "quarters of the decoder"
        ratio = ratio_of(keep, layers, num_layers) if isinstance(keep, float) else _RATIO
        shares = [ratio**i for i in range(1, len(layers))]
        return tuple(map(Cut, layers, (*shares, None))), "quarters of the decoder"


def ratio_of(keep: float, layers: list[int], num_layers: int) -> float:
    """The share that every cut keeps of what is left, so that the average over layers is `keep`."""
    ends = [*layers[1:], num_layers]
    low, high = 0.0, 1.0
    for _ in range(50):
        ratio = (low + high) / 2
        spent = layers[0] + sum(
            (end - start) * ratio ** (i + 1) for i, (start, end) in enumerate(zip(layers, ends, strict=True))
        )
        low, high = (ratio, high) if spent < keep * num_layers else (low, ratio)
    return max(high, 1e-6)
