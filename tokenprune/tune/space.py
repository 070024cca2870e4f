"""The search space of a model and budget: what its methods declare, as Optuna asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.analysis.memory import Memory
from tokenprune.api import family_of, pruned, report
from tokenprune.budget import Keep
from tokenprune.errors import ConfigError, UnsupportedModelError
from tokenprune.methods import METHODS, find_method
from tokenprune.methods.seen import Needs
from tokenprune.methods.uniform import Uniform
from tokenprune.models import stock_model
from tokenprune.models.decoders import offers_states, takes_biases
from tokenprune.space import Dimension, OneOf, Point, Real, Setting, Whole
from tokenprune.tokens import VisionAttention
from tokenprune.tune import stages

_PICTURES = 8  # calls that are looked at
Range = tuple[float, float]


@dataclass(frozen=True)
class _Peaks(Uniform):
    """Notes how peaked the tower's attention is."""

    peaks: list[float] = field(default_factory=list)

    def needs(self) -> Needs:
        return Needs(vision=self._note)

    def _note(self, attention: VisionAttention) -> Tensor:
        received = attention.received()
        self.peaks.append(float(received.max() / received.mean()))
        return received


def setting_of(model: Any, calls: Iterable[Mapping[str, Any]], keep: Keep, memory: Memory) -> Setting:
    """What search spaces depend on, seen on a few calls of the model (stock, not wrapped)."""
    family = family_of(model)
    layers = len(family.layers())
    probe, side, looked = _Peaks(), 1, True
    for inputs in islice(calls, _PICTURES):
        arguments: dict[str, Any] = {"method": probe} if looked else {"method": "random"}
        with memory.features(model), torch.inference_mode():
            try:
                side = max(side, _longest(model, inputs, arguments))
            except UnsupportedModelError:  # a tower that cannot be looked into
                looked = False
                side = max(side, _longest(model, inputs, {"method": "random"}))
    return Setting(
        num_layers=layers,
        default_layer=METHODS["uniform"]().default_cuts(family.name, layers)[0][0].layer,
        keep=keep,
        grid_side=side,
        attention_peak=float(np.quantile(probe.peaks, 0.99)) if probe.peaks else None,
        biases=takes_biases(family.text_model().config),
        scored=offers_states(family.text_model().config) and len(family.attending()) == layers,
    )


def _longest(model: Any, inputs: Mapping[str, Any], arguments: dict[str, Any]) -> int:
    with pruned(model, **arguments, keep=1.0, layer=0):
        stock_model(model)(**inputs, use_cache=False, logits_to_keep=1)
        grids = [grid for image in report(model).images for grid in image.grids]
    return max((max(height, width) for _, height, width in grids), default=1)


@dataclass(frozen=True)
class Space:
    """Methods with their dimensions, and the budget where it is searched too.

    Attributes:
        setting: of the model, at the least budget.
        methods: each method's dimensions by name.
        keep: the budget, or the range it is searched in.
        served: whether every point is one that vLLM serves: one cut, before the LLM, without biases.
    """

    setting: Setting
    methods: Mapping[str, Mapping[str, Dimension]]
    keep: Keep | Range
    served: bool = False

    @classmethod
    def of(
        cls, setting: Setting, methods: Sequence[str] | None, keep: Keep | Range, served: bool = False
    ) -> Space:
        """The space of the methods named, or of all that have one.

        Raises:
            ConfigError: a method that is none, or has nothing to search here.
        """
        if served:  # as if the decoder had one layer and took no biases
            setting = replace(setting, num_layers=1, default_layer=0, biases=False)
        if methods is not None:
            methods = [_own_name(name) for name in methods]
        unknown = [name for name in methods or () if name != stages.NAME and find_method(name) is None]
        if unknown:
            raise ConfigError(f"unknown method {unknown[0]!r}; choose from {', '.join(sorted(METHODS))}")
        found = {
            name: space
            for name, own in METHODS.items()
            if (methods is None or name in methods) and (not served or not own().needs().not_ahead)
            if setting.scored or not own().needs().projected
            if (space := own.search_space(setting)) is not None
        }
        if methods is None or stages.NAME in methods:
            of_stages = stages.search_space(setting)
            found |= {stages.NAME: of_stages} if of_stages is not None else {}
        missing = [name for name in methods or () if name not in found]
        if missing:
            raise ConfigError(f"method {missing[0]!r} has nothing to search on this model; leave it out")
        return cls(setting, found, keep, served)

    def ask(self, trial: Any) -> dict[str, Any]:
        """A point of the space as arguments of `wrap`, asked of an Optuna trial."""
        names = list(self.methods)
        method = names[0] if len(names) == 1 else trial.suggest_categorical("method", names)
        point = {name: _suggest(trial, f"{method}.{name}", d) for name, d in self.methods[method].items()}
        keep = trial.suggest_float("keep", *self.keep) if isinstance(self.keep, tuple) else self.keep
        at = stages.arguments_at if method == stages.NAME else METHODS[method].arguments_at
        own = at(point, replace(self.setting, keep=keep))
        return {"method": method, "keep": keep, **own, **({"layer": 0} if self.served else {})}

    def defaults(self) -> list[Point]:
        """Each method's default, as a point of the study."""
        return [
            self.point(method, {name: dimension.default for name, dimension in space.items()})
            for method, space in self.methods.items()
        ]

    def point(self, method: str, own: Mapping[str, Any]) -> Point:
        """A point of a method's space as one of the study."""
        chosen: Point = {"method": method} if len(self.methods) > 1 else {}
        return chosen | {f"{method}.{name}": value for name, value in own.items()}

    def describe(self) -> dict[str, Any]:
        """What a study is about, as plain types."""
        return {method: {n: repr(d) for n, d in space.items()} for method, space in self.methods.items()}


def _suggest(trial: Any, name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, OneOf):
        return trial.suggest_categorical(name, dimension.values)
    if isinstance(dimension, Whole):
        return trial.suggest_int(name, dimension.low, dimension.high)
    assert isinstance(dimension, Real)
    return trial.suggest_float(name, dimension.low, dimension.high)


def _own_name(method: str) -> str:
    """A profile holds names only: of "package.module:Class" the name that the class gives itself."""
    cls = find_method(method) if ":" in method else None
    return method if cls is None else cls.name
