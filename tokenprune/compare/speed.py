"""How long arms take: prefill, time to first token and a whole answer, paired with the unpruned model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from tokenprune.api import pruned
from tokenprune.compare.answering import Asker
from tokenprune.compare.arms import NONE, Arm
from tokenprune.compare.downsample import interpolated
from tokenprune.errors import TokenPruneError
from tokenprune_kernels import timing

WHATS = ("prefill", "first token", "whole answer")


def measure_times(
    asker: Asker, arms: Sequence[Arm], batch_size: int, what: str, rounds: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Milliseconds of each arm at a batch size, and the ratio unpruned / arm round by round.

    Args:
        asker: with the questions; those of the most common shape are taken.
        arms: the unpruned one among them. Those that the model or budget does not allow are left out.
        batch_size: prompts.
        what: "prefill": the decoder's, pictures encoded beforehand; "first token": with the vision tower; "whole
            answer": `new_tokens` tokens, with the tower.
        rounds: every arm runs once in each.
        new_tokens: of a whole answer.
    """
    inner: Any = asker.inner
    numbers = asker.alike(batch_size)

    def run(inputs: Any) -> object:
        if what == "prefill":
            return inner(**inputs, use_cache=True, logits_to_keep=1)
        tokens = 1 if what == "first token" else new_tokens
        return inner.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)

    ready: dict[str, timing.Timed] = {}
    for arm in arms:
        try:
            inputs = asker.inputs(arm, numbers)
            context = partial(_inside, asker, arm, what == "prefill")
            with context():
                run(inputs)
        except TokenPruneError:
            continue
        ready[arm.key] = timing.Timed(run, lambda inputs=inputs: inputs, context)  # type: ignore[misc]
    taken = timing.interleave(ready, rounds, warmup=1, device=str(inner.device))
    found = []
    for key, seconds in taken.items():
        ratio = timing.ratio(taken[NONE], seconds)
        found.append(
            {
                "arm": key,
                "batch_size": batch_size,
                "what": what,
                "rounds": rounds,
                "ms": timing.milliseconds(seconds),
                "speedup": ratio.median,
                "p20": ratio.p20,
                "p80": ratio.p80,
            }
        )
    return found


@contextmanager
def _inside(asker: Asker, arm: Arm, remembered: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if arm.shrinks:
            stack.enter_context(interpolated(asker.family))
        if remembered:
            stack.enter_context(asker.memory.features(asker.model))
        if arm.name != NONE and not arm.shrinks:
            stack.enter_context(pruned(asker.model, **arm.arguments))
        yield
