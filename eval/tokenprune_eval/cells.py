"""The rows of the accuracy table: a method with its parameters, a layer, an average retention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.tokens import State

SOURCES: tuple[State, ...] = ("query", "key", "value", "hidden")
NORMALIZATIONS = ("none", "trace")
METHODS = ("none", "random", "uniform", "entropyprune")


@dataclass(frozen=True)
class Cell:
    """One configuration.

    Attributes:
        method: its name.
        parameters: of the method, as (name, value).
        layer: decoder layer the cut enters; None for `none`.
        keep: average retention asked for; None for `none`.
    """

    method: str
    parameters: tuple[tuple[str, Any], ...] = ()
    layer: int | None = None
    keep: float | None = None

    @property
    def key(self) -> str:
        """The cell's name in the CSV files."""
        place = {"layer": self.layer, "keep": self.keep}
        parts = [*self.parameters, *((k, v) for k, v in place.items() if v is not None)]
        return " ".join([self.method, *(f"{name}={value}" for name, value in parts)])

    @property
    def label(self) -> str:
        """What the table calls the method: "entropyprune (query, none)", "random"."""
        shown = [str(value) for name, value in self.parameters if name != "seed"]
        return f"{self.method} ({', '.join(shown)})" if shown else self.method

    def arguments(self) -> dict[str, Any]:
        """Of `tokenprune.wrap`, besides the model."""
        place = {} if self.keep is None else {"keep": self.keep, "layer": self.layer, "budget": "average"}
        return {"method": self.method, **dict(self.parameters), **place}


def grid(
    budgets: Sequence[float],
    layers: Sequence[int],
    seeds: int,
    methods: Sequence[str] = METHODS,
    sources: Sequence[str] = SOURCES,
    normalizations: Sequence[str] = NORMALIZATIONS,
) -> list[Cell]:
    """Every cell of the table, cheap questions first: `none`, the controls, EntropyPrune's variants."""
    variants: list[tuple[str, tuple[tuple[str, Any], ...]]] = []
    if "random" in methods:
        variants += [("random", (("seed", seed),)) for seed in range(seeds)]
    if "uniform" in methods:
        variants += [("uniform", ())]
    if "entropyprune" in methods:
        variants += [
            ("entropyprune", (("source", source), ("normalization", normalization)))
            for normalization in normalizations
            for source in sources
        ]
    cells = [Cell("none")] if "none" in methods else []
    return cells + [
        Cell(*variant, layer, keep) for layer in layers for keep in budgets for variant in variants
    ]
