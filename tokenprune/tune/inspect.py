"""Drift of one setting on somebody's prompts: its spread, its worst cases, and what controls do there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tokenprune.analysis.batches import batched
from tokenprune.analysis.memory import Memory
from tokenprune.api import pruned, report
from tokenprune.budget import Keep
from tokenprune.draw import tile
from tokenprune.models import stock_model
from tokenprune.tune.controls import control_drifts
from tokenprune.tune.drift import drifts


def spread(drift: NDArray[np.float64]) -> dict[str, float]:
    """Mean, median, 95 % quantile and maximum."""
    return {
        "mean": float(drift.mean()),
        "median": float(np.median(drift)),
        "p95": float(np.percentile(drift, 95)),
        "worst": float(drift.max()),
    }


@dataclass(frozen=True)
class Inspection:
    """Attributes:
    method: that the setting came to.
    arguments: of `wrap`.
    drift: (prompts,).
    controls: the same of controls at the same budget, cut before the LLM.
    """

    method: str
    arguments: Mapping[str, Any]
    drift: NDArray[np.float64]
    controls: Mapping[str, NDArray[np.float64]]

    def spreads(self) -> dict[str, dict[str, float]]:
        """`spread` of the setting and of each control."""
        return {name: spread(own) for name, own in {self.method: self.drift, **self.controls}.items()}

    def worst(self, count: int) -> list[int]:
        """The prompts of largest drift, the largest first."""
        return [int(i) for i in np.argsort(-self.drift, kind="stable")[:count]]

    def draw(
        self, model: Any, processor: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> Image.Image:
        """What the setting keeps of a prompt's images, cut by cut."""
        with pruned(model, **self.arguments), torch.inference_mode():
            stock_model(model)(**inputs, use_cache=False, logits_to_keep=1)
            told = report(model)
        drawn = told.draw(images, processor=processor, stages=True)
        return tile(drawn, columns=1 if len(told.layers_cut) > 1 else len(drawn))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {"spreads": self.spreads(), "drift": self.drift.tolist()}


def inspect_drift(
    model: Any,
    calls: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    keep: Keep,
    *,
    metric: str = "cosine",
    batch_size: int = 8,
    memory: Memory | None = None,
    told: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> Inspection:
    """Measure a setting, and the controls at a budget.

    Args:
        model: stock, not wrapped.
        calls: inputs of one prompt each; no answers are needed.
        arguments: of `wrap`.
        keep: average budget of the controls, the setting's own.
        metric: see `METRICS`.
        batch_size: prompts per forward.
        memory: to share.
        told: called after every batch of the setting: what is measured, how many prompts, of how many.

    Raises:
        ConfigError: a setting that cannot be.
        TokenPruneError: no prompts.
    """
    memory, batches = memory or Memory(), list(batched(calls, batch_size))
    found: list[NDArray[np.float64]] = []
    for batch in drifts(model, batches, arguments, memory, metric):
        found.append(batch.drift)
        told("the setting", sum(map(len, found)), len(calls))
    drift = np.concatenate(found)
    told("the controls", 0, len(calls))
    with memory.features(model), pruned(model, **arguments), torch.inference_mode():
        stock_model(model)(**calls[0], use_cache=False, logits_to_keep=1)
        method = report(model).method
    controls = control_drifts(model, batches, keep, memory, metric)
    return Inspection(method, dict(arguments), drift, controls)
