"""A testbed model, its held-out questions, and what a setting of pruning does to both: drift and accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import tokenprune
from tokenprune import machine
from tokenprune.analysis.batches import batched
from tokenprune.analysis.calibration import calibration_calls, load_calibration
from tokenprune.analysis.memory import Memory
from tokenprune.tune import measure
from tokenprune_testbed import MODELS, Result, Sample, evaluate, evaluation_set, load, pages
from tokenprune_testbed.evaluate import MAX_NEW_TOKENS
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.pages import evaluation_pages

BATCH = 50
DRIFT_BATCH = 8


class Bench:
    """Args:
    name: of `tokenprune_testbed.load`; of a folder RUN/model, which `tokenprune_testbed.train` wrote, RUN is the name.
    questions: held-out ones, for accuracy.
    prompts: held-out ones, for drift: the first of those with one image.
    """

    def __init__(self, name: str, questions: int, prompts: int = 96, batch_size: int = BATCH) -> None:
        self.name = Path(name).parent.name if Path(name).is_dir() else name
        self.model, self.processor = load(name)
        self.batch_size = batch_size
        self.longest = pages.MAX_NEW_TOKENS if name == "pages" else MAX_NEW_TOKENS
        self.memory = Memory()
        self.samples = questions_to(self.name, questions)
        one = [sample for sample in self.samples if len(sample.images) == 1][:prompts]
        self.held_out = list(
            batched([dict(make_inputs(self.processor, [sample])) for sample in one], DRIFT_BATCH)
        )
        self.answered: dict[str, Result] = {}

    def calibration(self, count: int, seed: int) -> list[Any]:
        """Inputs of training scenes, one prompt each."""
        name = self.name if self.name in MODELS else "small"
        samples = load_calibration(f"testbed:{name}", count, seed=seed)
        return list(calibration_calls(self.processor, samples))

    def drift(self, arguments: Mapping[str, Any]) -> npt.NDArray[np.float64]:
        """Of the held-out prompts."""
        return measure(self.model, self.held_out, arguments, self.memory)

    def answers(self, arguments: Mapping[str, Any]) -> Result:
        """To the held-out questions, under arguments of `wrap`; asked once per setting."""
        key = setting(arguments)
        if key not in self.answered:
            with tokenprune.pruned(self.model, **arguments), self.memory.features(self.model):
                self.answered[key] = evaluate(
                    self.model, self.processor, self.samples, self.batch_size, max_new_tokens=self.longest
                )
        return self.answered[key]

    def row(self, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Held-out drift and accuracy as columns of a CSV, with the machine."""
        return {
            "held_out_drift": f"{self.drift(arguments).mean():.6g}",
            **self.accuracy(self.answers(arguments)),
            "setting": setting(arguments),
            **machine.describe(),
        }

    @staticmethod
    def accuracy(result: Result) -> dict[str, str]:
        """`ACCURACY` of answers."""
        score = result.overall
        shares = {"accuracy": score.accuracy, "low": score.low, "high": score.high}
        return {"questions": str(score.total), **{name: f"{value:.4f}" for name, value in shares.items()}}


ACCURACY = ("questions", "accuracy", "low", "high")
ROW = ("held_out_drift", *ACCURACY, "setting", *machine.FIELDS)


def questions_to(model: str, count: int) -> list[Sample]:
    """Held-out questions of the kind that a testbed model was trained on."""
    return evaluation_pages(count) if model == "pages" else evaluation_set(count, seed=0)


def setting(arguments: Mapping[str, Any]) -> str:
    """Arguments of `wrap` as one line of JSON, numbers to four digits."""
    return json.dumps(_short(dict(arguments)), sort_keys=True)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: _short(own) for name, own in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_short(own) for own in value]
    return value
