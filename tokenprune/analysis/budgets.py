"""Calibrating adaptive budgets: the tau with which a rule keeps, on average over pictures, what is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.adaptive import Adaptive, statistic
from tokenprune.api import pruned
from tokenprune.budget import Escalate
from tokenprune.errors import ConfigError
from tokenprune.methods import ImageTokens, Needs, ScoreMethod
from tokenprune.methods.importance import grey_entropy
from tokenprune.models import stock_model
from tokenprune.tensors import entropy_of

_STEPS = 60  # of a bisection: beyond the precision of a float


def calibrate(model: Any, calls: Iterable[Mapping[str, Any]], adaptive: Adaptive) -> Adaptive:
    """The same budget with its tau, found on unlabelled pictures.

    Args:
        model: stock, not wrapped.
        calls: its inputs, as its processor makes them; about 100 pictures like those that will be asked about.
        adaptive: mean, rule and bounds.

    Returns:
        With the tau at which the mean share of these pictures, within the bounds, is nearest to `mean`.

    Raises:
        ConfigError: no pictures, or bounds that leave the mean out of reach.
        UnsupportedModelError: the family does not offer pixels, which the rule reads.
    """
    read = read_pictures(model, calls, adaptive)
    if not read:
        raise ConfigError("the calls have no pictures to calibrate on")
    low, high = 0.0, 1.0
    if adaptive.rule != "energy":
        least = min(float(one) for one in read)
        high = 1.0 / max(least, 1e-6)  # every picture whole
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if mean_share(adaptive, read, middle) < adaptive.mean:
            low = middle
        else:
            high = middle
    return replace(adaptive, tau=high)


def mean_share(adaptive: Adaptive, read: list[Tensor], tau: float) -> float:
    """Of the pictures whose statistics these are."""
    return sum(adaptive.bounded(float(adaptive.told(one, tau))) for one in read) / len(read)


def read_pictures(model: Any, calls: Iterable[Mapping[str, Any]], adaptive: Adaptive) -> list[Tensor]:
    """What the rule reads of each picture, see `statistic`; on the host."""
    noting = _Noting(adaptive)
    inner = stock_model(model)
    with pruned(model, noting, keep=0.5, layer=0), torch.inference_mode():
        for inputs in calls:
            inner(**inputs, use_cache=False, logits_to_keep=1)
    return [statistic(adaptive.rule, own).double().cpu() for own in noting.seen]


@dataclass(frozen=True)
class _Noting(ScoreMethod):
    """Notes what it is shown of each picture, and keeps any half of it."""

    name: ClassVar[str] = "noting"
    adaptive: Adaptive
    seen: list[Tensor] = field(default_factory=list, compare=False)

    def needs(self) -> Needs:
        return Needs(pixels=grey_entropy) if self.adaptive.reads_pixels else Needs(features=True)

    def score(self, image: ImageTokens) -> Tensor:
        shown = image.pixels if self.adaptive.reads_pixels else image.features
        assert shown is not None
        self.seen.append(shown)
        return -torch.arange(image.n, dtype=torch.float32, device=image.raster.device)


def calibrate_escalation(
    model: Any, calls: Iterable[Mapping[str, Any]], share: float, larger: float, **arguments: Any
) -> Escalate:
    """The entropy above which a share of prompts is prefilled again.

    Args:
        model: stock, not wrapped.
        calls: its inputs, padded on the left if at all; about 100 like those that will be asked.
        share: of the prompts that shall be done again with more, between 0 and 1.
        larger: share of the visual tokens that they keep then.
        arguments: of `wrap`, with the smaller budget.

    Raises:
        ConfigError: no prompts, or a share that is none.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share is between 0 and 1, not {share!r}")
    found: list[float] = []
    with pruned(model, **arguments), torch.inference_mode():
        for inputs in calls:
            logits = stock_model(model)(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            found += entropy_of(logits).tolist()
    if not found:
        raise ConfigError("there are no prompts to calibrate on")
    return Escalate(larger, float(torch.tensor(found, dtype=torch.float64).quantile(1 - share)))
