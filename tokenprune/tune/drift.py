"""Drift: how far the last prompt position moves when the model is pruned. Needs prompts, no answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.analysis.memory import LastState, Memory, last_state
from tokenprune.api import pruned, report
from tokenprune.errors import ConfigError, TokenPruneError


def cosine(pruned: LastState, whole: LastState) -> Tensor:
    """1 - cosine of the final-norm states (VFlowOpt, arXiv 2508.05211): (B,)."""
    return cosine_of(pruned.state, whole.state)


def cosine_of(pruned: Tensor, whole: Tensor) -> Tensor:
    """`cosine` of the states (B, D) themselves."""
    return 1 - torch.nn.functional.cosine_similarity(pruned.double(), whole.double())


def relative_l2(pruned: LastState, whole: LastState) -> Tensor:
    """|pruned - whole| / |whole| of the states: (B,)."""
    return (pruned.state.double() - whole.state.double()).norm(dim=-1) / whole.state.double().norm(dim=-1)


def kl(pruned: LastState, whole: LastState) -> Tensor:
    """KL(whole || pruned) of the next token's distribution, in nats: (B,)."""
    p, q = whole.logits.double().log_softmax(-1), pruned.logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def cauchy_schwarz(pruned: LastState, whole: LastState) -> Tensor:
    """-log(<p, q> / (|p| |q|)) of the next token's distributions, the Cauchy-Schwarz divergence: (B,)."""
    p, q = whole.logits.double().softmax(-1), pruned.logits.double().softmax(-1)
    return -torch.nn.functional.cosine_similarity(p, q).clamp(min=1e-300).log()


METRICS: dict[str, Callable[[LastState, LastState], Tensor]] = {
    "cosine": cosine,
    "relative_l2": relative_l2,
    "kl": kl,
    "cauchy_schwarz": cauchy_schwarz,
}


def check_metric(metric: str) -> None:
    """Raises ConfigError where there is no metric of that name."""
    if metric not in METRICS:
        raise ConfigError(f"unknown drift {metric!r}; choose one of {', '.join(METRICS)}")


@dataclass(frozen=True)
class BatchDrift:
    """What one batch of prompts showed.

    Attributes:
        drift: (B,) what the metric says; NaN counts as the worst there is, 2 for "cosine" and infinity otherwise.
        seconds: the pruned prefill took, all rows.
        flops, flops_unpruned: of the decoder's prefill, all rows.
    """

    drift: NDArray[np.float64]
    seconds: float
    flops: int
    flops_unpruned: int


def drifts(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    memory: Memory,
    metric: str = "cosine",
) -> Iterator[BatchDrift]:
    """Drift under a setting, batch by batch: the next is computed when it is asked for.

    The model is wrapped from the first batch on until the iterator ends or is closed. Arguments and errors as for
    `measure`.
    """
    check_metric(metric)
    worst = 2.0 if metric == "cosine" else float("inf")
    count = 0
    with memory.features(model), pruned(model, **arguments):
        for count, inputs in enumerate(batches, 1):  # noqa: B007
            whole = memory.reference(model, inputs)
            start = time.perf_counter()
            own = last_state(model, inputs)
            seconds = time.perf_counter() - start
            told = report(model)
            found = METRICS[metric](own, whole).nan_to_num(worst)
            yield BatchDrift(found.numpy(), seconds, told.flops, told.flops_unpruned)
    if not count:
        raise TokenPruneError("there are no prompts to measure drift on")


def measure(
    model: Any,
    calls: Iterable[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    memory: Memory,
    metric: str = "cosine",
) -> NDArray[np.float64]:
    """Drift of each prompt under a setting.

    Args:
        model: stock, not wrapped.
        calls: its inputs, padded on the left if at all.
        arguments: of `wrap`.
        memory: of vision features and of what the unpruned model makes of the prompts.
        metric: a name of `METRICS`.

    Returns:
        (prompts,), see `BatchDrift.drift`.

    Raises:
        ConfigError: a setting that cannot be, or no such metric.
        TokenPruneError: no prompts.
    """
    return np.concatenate([batch.drift for batch in drifts(model, calls, arguments, memory, metric)])
