"""Ask a model the held-out questions and count exact matches.

python -m tokenprune_testbed.evaluate --samples 2100
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenprune_testbed.grounds import UInt8Array
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.pages import MAX_NEW_TOKENS as LONGEST_PAGE
from tokenprune_testbed.pages import PAGE_FAMILIES, evaluation_pages
from tokenprune_testbed.questions import FAMILIES, Sample, evaluation_set
from tokenprune_testbed.scenes import DEFAULT_SCENES, SCENE_KINDS

MAX_NEW_TOKENS = 6  # the longest answer is four words and the end token


@dataclass(frozen=True)
class Score:
    """``correct`` of ``total`` answers, with the bounds of the 95 % Wilson interval."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Score:
        correct, total = sum(outcomes), len(outcomes)
        return cls(correct, total, correct / total if total else math.nan, *wilson_interval(correct, total))

    def __str__(self) -> str:
        return f"{100 * self.accuracy:5.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.total}"


@dataclass(frozen=True)
class Result:
    """Accuracy overall and per family; ``correct`` and ``answers`` are in the order of the samples given."""

    overall: Score
    families: dict[str, Score]
    correct: list[bool] = field(repr=False)
    answers: list[str] = field(repr=False)
    seconds: float

    def __str__(self) -> str:
        lines = [f"{'overall':<12}{self.overall}"]
        lines += [f"{name:<12}{score}" for name, score in self.families.items()]
        return "\n".join([*lines, f"{self.seconds:.1f} s"])

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Bounds of the Wilson score interval of a proportion; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    p, spread = correct / total, z * z / total
    middle = p + spread / 2
    reach = z * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return max(0.0, (middle - reach) / (1 + spread)), min(1.0, (middle + reach) / (1 + spread))


def _batches(samples: Sequence[Sample], batch_size: int, mix_image_counts: bool) -> Iterator[list[int]]:
    """Indices of samples, batch by batch; one- and two-image prompts apart unless asked otherwise."""
    order = list(range(len(samples)))
    if mix_image_counts:
        groups = [order]
    else:
        counts = sorted({len(s.images) for s in samples})
        groups = [[i for i in order if len(samples[i].images) == count] for count in counts]
    for group in groups:
        # Prompts of one length need no padding.
        group.sort(key=lambda i: (len(samples[i].question.split()), i))
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _shuffled(samples: Sequence[Sample], seed: int) -> list[list[UInt8Array]]:
    """Images of another question with as many images: a blind model is not hurt, a seeing one is."""
    rng = np.random.default_rng(seed)
    images = [s.images for s in samples]
    for count in {len(i) for i in images}:
        slots = [i for i, sample in enumerate(samples) if len(sample.images) == count]
        cycle = rng.permutation(slots)
        for slot, source in zip(cycle, np.roll(cycle, 1), strict=True):
            images[slot] = samples[source].images
    return images


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int = 50,
    *,
    shuffle_images: bool = False,
    mean_image: bool = False,
    mix_image_counts: bool = False,
    after_generate: Callable[[list[int]], None] | None = None,
    **generate_kwargs: Any,
) -> Result:
    """Greedy answers from ``model.generate``, counted right when they match the expected words exactly.

    Args:
        model: anything with ``generate`` and ``device``, pruned or not.
        shuffle_images: ask every question about another question's images (control: must fall to the prior).
        mean_image: replace every image by one flat image of the samples' mean colour (control, likewise).
        mix_image_counts: allow one- and two-image prompts in one batch.
        after_generate: called after each batch with the indices of its samples, e.g. to read a pruning report.
        generate_kwargs: passed on to ``generate``.
    """
    started = time.perf_counter()
    images = _shuffled(samples, seed=0) if shuffle_images else [s.images for s in samples]
    if mean_image:
        mean = np.mean([frame.mean((0, 1)) for s in samples for frame in s.images], axis=0)
        images = [[np.full_like(frame, mean.round().astype(np.uint8)) for frame in group] for group in images]
    answers = [""] * len(samples)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, **generate_kwargs}
    for indices in _batches(samples, batch_size, mix_image_counts):
        asked = [replace(samples[i], images=images[i]) for i in indices]
        inputs = make_inputs(processor, asked).to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, **options)
        new = output[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(indices, processor.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = " ".join(text.split())
        if after_generate is not None:
            after_generate(indices)
    correct = [answer == sample.answer for answer, sample in zip(answers, samples, strict=True)]
    families = {
        family: Score.of([c for c, s in zip(correct, samples, strict=True) if s.family == family])
        for family in (*FAMILIES, *PAGE_FAMILIES)
        if any(s.family == family for s in samples)
    }
    return Result(Score.of(correct), families, correct, answers, time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate a shipped model, or another, with and without its eyes."""
    from tokenprune_testbed.loading import load

    parser = argparse.ArgumentParser(description="Accuracy of the testbed model on held-out questions.")
    parser.add_argument(
        "--model", default="small", help="small (default), smol, pages, a folder, or an adapter's file"
    )
    parser.add_argument("--scenes", choices=SCENE_KINDS, default=DEFAULT_SCENES)
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--samples", type=int, default=2100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument(
        "--controls", action="store_true", help="also with shuffled and with mean-pixel images"
    )
    parser.add_argument("--json", type=Path, default=None, help="write the results there")
    options = parser.parse_args(argv)
    model, processor = load(options.model)
    longest = MAX_NEW_TOKENS
    if options.model == "pages":
        samples, longest = evaluation_pages(options.samples, options.seed, split=options.split), LONGEST_PAGE
    else:
        samples = evaluation_set(options.samples, options.seed, options.split, scenes=options.scenes)
    runs: dict[str, dict[str, Any]] = {"images": {}}
    if options.controls:
        runs |= {"shuffled images": {"shuffle_images": True}, "mean image": {"mean_image": True}}
    results = {}
    for name, control in runs.items():
        result = evaluate(model, processor, samples, options.batch_size, max_new_tokens=longest, **control)
        print(f"{name}\n{result}\n", flush=True)
        results[name] = result.to_dict()
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
