"""What one arm answers, question by question, with drift, tokens and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tokenprune.analysis.batches import batched
from tokenprune.analysis.calibration import make_prompt
from tokenprune.analysis.memory import Memory
from tokenprune.api import family_of, pruned, report
from tokenprune.compare.arms import Arm
from tokenprune.compare.downsample import interpolated, shrunk_prompt
from tokenprune.compare.questions import Question
from tokenprune.models import stock_model
from tokenprune.tune.drift import cosine_of


@dataclass(frozen=True)
class Answer:
    """Attributes:
    question: its number.
    text: what the model said.
    drift: 1 - cosine of the last prompt position's final state and the unpruned model's.
    kept: visual tokens, averaged over decoder layers, as a share of the unpruned prompt's.
    kv: bytes of keys and values after the prompt.
    flops: of the decoder's prefill as a share of the unpruned one's.
    """

    question: int
    text: str
    drift: float
    kept: float
    kv: float
    flops: float


@dataclass
class Asker:
    """Asks a model the same questions under different arms.

    Attributes:
        model: stock, not wrapped.
        processor: its own.
        questions: all of them.
        batch_size: prompts per batch; those of one length and number of pictures go together, without padding.
        max_new_tokens: of an answer.
        memory: of vision features and of the unpruned model's states.
    """

    model: Any
    processor: Any
    questions: Sequence[Question]
    batch_size: int = 8
    max_new_tokens: int = 32
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self.inner = stock_model(self.model)
        self.family = family_of(self.model)
        self.token = self.family.token_id("image")
        self.prompts = [self._to(make_prompt(self.processor, q.images, q.text)) for q in self.questions]
        self.tokens = [int((p["input_ids"] == self.token).sum()) for p in self.prompts]

    def ask(self, arm: Arm, done: frozenset[int] = frozenset()) -> Iterator[list[Answer]]:
        """Answers of an arm, batch by batch, but for the questions that are done.

        Raises:
            BudgetError: the arm cannot keep so few.
            UnsupportedModelError: the model does not offer what the arm needs.
        """
        left = [i for i in range(len(self.questions)) if i not in done]
        own = dict(zip(left, self._calls(arm, left), strict=True))
        inside = interpolated(self.family) if arm.shrinks else nullcontext()
        with inside, self.memory.features(self.model), pruned(self.model, **arm.arguments):
            for numbers in self._groups(own):
                (inputs,) = batched([own[i] for i in numbers], len(numbers))
                yield self._answers(numbers, inputs)

    def inputs(self, arm: Arm, numbers: Sequence[int]) -> dict[str, Any]:
        """Of an arm and some questions of one shape, as one batch."""
        (inputs,) = batched(self._calls(arm, numbers), len(numbers))
        return inputs

    def alike(self, count: int) -> list[int]:
        """Questions of the most common shape, some of them again where there are fewer than `count`."""
        groups = [list(g) for _, g in groupby(sorted(range(len(self.prompts)), key=self._shape), self._shape)]
        largest = max(groups, key=len)
        return [largest[i % len(largest)] for i in range(count)]

    def _calls(self, arm: Arm, numbers: Sequence[int]) -> list[Any]:
        if not arm.shrinks:
            return [self.prompts[i] for i in numbers]
        asked = [self.questions[i] for i in numbers]
        assert arm.keep is not None
        return [
            self._to(shrunk_prompt(self.family, self.processor, q.images, q.text, arm.keep)) for q in asked
        ]

    def _to(self, inputs: Any) -> Any:
        return inputs.to(self.inner.device, dtype=self.inner.dtype)

    def _shape(self, number: int) -> tuple[int, int]:
        return len(self.questions[number].images), self.prompts[number]["input_ids"].shape[1]

    def _groups(self, calls: Mapping[int, Any]) -> Iterator[list[int]]:
        def shape(i: int) -> tuple[Any, ...]:
            return (*self._shape(i), calls[i]["input_ids"].shape[1], *calls[i]["pixel_values"].shape)

        for _, group in groupby(sorted(calls, key=lambda i: (*shape(i), i)), shape):
            numbers = list(group)
            for start in range(0, len(numbers), self.batch_size):
                yield numbers[start : start + self.batch_size]

    def _answers(self, numbers: Sequence[int], inputs: Mapping[str, Any]) -> list[Answer]:
        reference = self._reference(numbers)
        states: list[Tensor] = []
        norm = self.family.final_norm()
        handle = norm.register_forward_hook(lambda _module, _args, output: states.append(output[:, -1]))
        try:
            with torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        finally:
            handle.remove()
        told = report(self.model)
        new = output[:, inputs["input_ids"].shape[1] :]
        said = self.processor.batch_decode(new, skip_special_tokens=True)
        first = states[0].float().cpu()  # of the prompt; those after it are of the answer's tokens
        drift = cosine_of(first, reference)
        rows = range(len(numbers))
        kept = [
            sum(image.average + image.structural for image in told.images if image.row == r) for r in rows
        ]
        whole = self._whole_flops(numbers) if told.flops else 1
        return [
            Answer(
                question=number,
                text=" ".join(said[r].split()),
                drift=float(drift[r]),
                kept=kept[r] / self.tokens[number] if self.tokens[number] else 1.0,
                kv=told.kv_used / len(numbers),
                flops=told.flops / whole,
            )
            for r, number in enumerate(numbers)
        ]

    def _reference(self, numbers: Sequence[int]) -> Tensor:
        """The unpruned model's last states of the prompts as they are."""
        (inputs,) = batched([self.prompts[i] for i in numbers], len(numbers))
        return self.memory.reference(self.model, inputs).state

    def _whole_flops(self, numbers: Sequence[int]) -> int:
        """Of the unpruned prompts, which of a smaller picture are not the ones that were run."""
        from tokenprune.runtime.flops import layer_costs, prefill_flops

        costs = layer_costs(self.family)
        length = self.prompts[numbers[0]]["input_ids"].shape[1]
        return len(numbers) * prefill_flops(costs, [length] * len(costs))
