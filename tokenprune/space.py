"""What can be tuned: the dimensions of a method's search space, and what they may depend on."""

from __future__ import annotations

from dataclasses import dataclass

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
