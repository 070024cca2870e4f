"""What can be tuned: the dimensions of a method's search space, and what they may depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenprune.budget import Keep


@dataclass(frozen=True)
class Real:
    """A number in [low, high]; `default` is where an untuned method stands."""

    low: float
    high: float
    default: float


@dataclass(frozen=True)
class Whole:
    """A whole number in low .. high."""

    low: int
    high: int
    default: int


@dataclass(frozen=True)
class OneOf:
    """One of a few values; the first is the default."""

    values: tuple[str | bool, ...]

    @property
    def default(self) -> str | bool:
        return self.values[0]


Dimension = Real | Whole | OneOf
Point = dict[str, float | int | str | bool]


@dataclass(frozen=True)
class Setting:
    """What a search space may depend on.

    Attributes:
        num_layers: decoder layers L.
        default_layer: where a method that has no layer of its own cuts the model.
        keep: the budget, an average over layers.
        grid_side: tokens along the longest side of a view, in the calibration images.
        attention_peak: 0.99 quantile over them of max(c) / mean(c), c being the attention a patch receives in the
            vision layer that yields the features; None where the tower cannot be looked into.
        biases: whether the text model's attention takes biases.
        scored: whether queries and keys of every layer can be scored.
    """

    num_layers: int
    default_layer: int
    keep: Keep
    grid_side: int
    attention_peak: float | None = None
    biases: bool = True
    scored: bool = True

    @property
    def widest(self) -> float:
        """Multiples of the budget that a cut can keep."""
        return math.inf if isinstance(self.keep, int) else 1 / self.keep


#: What the layers behind the last cut keep at least, in multiples of the budget.
_LEAST = 0.05


def spend(layers: Sequence[int], ratios: Sequence[float], setting: Setting) -> list[tuple[int, Keep | None]]:
    """Cuts that meet the budget, whatever the ratios: what each but the last keeps; the last is solved.

    Args:
        layers: of the cuts, ascending, the first 0.
        ratios: of all cuts but the last: 0: the least with which later cuts, which keep no more, can meet the average;
            1: the most that leaves something to them.
        setting: the budget and the number of layers.
    """
    left, most, cuts = float(setting.num_layers), setting.widest, list[tuple[int, Keep | None]]()
    for (layer, after), ratio in zip(pairwise(layers), ratios, strict=False):
        least, most = _bounds(layer, after, left, most, setting)
        most = least + ratio * (most - least)
        left -= most * (after - layer)
        share = most * setting.keep
        cuts.append((layer, max(1, round(share)) if isinstance(setting.keep, int) else min(1.0, share)))
    return [*cuts, (layers[-1], None)]


def spent_ratios(layers: Sequence[int], shares: Sequence[float], setting: Setting) -> list[float]:
    """Ratios with which `spend` keeps these multiples of the budget, as far as it can."""
    left, most, ratios = float(setting.num_layers), setting.widest, []
    for (layer, after), share in zip(pairwise(layers), shares, strict=False):
        least, most = _bounds(layer, after, left, most, setting)
        ratios.append(min(1.0, max(0.0, (share - least) / (most - least))) if most > least else 0.0)
        most = least + ratios[-1] * (most - least)
        left -= most * (after - layer)
    return ratios


def _bounds(layer: int, after: int, left: float, most: float, setting: Setting) -> tuple[float, float]:
    """Least and most that a cut keeps, in multiples of the budget; `left`: layers times those still to be spent."""
    layers = setting.num_layers
    least = left / (layers - layer)
    return least, max(least, min(most, (left - _LEAST * (layers - after)) / (after - layer)))
