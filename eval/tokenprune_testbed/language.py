"""How a testbed model's prompts are made of token ids, for training and for what its patches must name.

The processor and its chat template are what users and the evaluation take; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune_testbed.grounds import COLUMN_WORDS, GROUNDS, ROW_WORDS, TINT_NAMES
from tokenprune_testbed.questions import QA, Sample
from tokenprune_testbed.scenes import COLOR_NAMES, KINDS

# What every patch must name in word space: what it shows, in which colour, in which third of the rows and columns.
PATCH_WORDS = {
    "kind": KINDS + GROUNDS,
    "color": COLOR_NAMES + TINT_NAMES,
    "row": ROW_WORDS,
    "column": COLUMN_WORDS,
}


@dataclass(frozen=True)
class Language:
    """The token ids of prompts.

    Attributes:
        prefix: before the images.
        pad: fills up rows.
        end: closes an answer.
        first: the first token of each word that patches name.
        ids: the token ids of a question from after the images to where the answer begins, and of the answer with
            its end.
    """

    prefix: tuple[int, ...]
    pad: int
    end: int
    first: Callable[[str], int]
    ids: Callable[[QA], tuple[list[int], list[int]]]

    def word_space(self, embeddings: Tensor) -> dict[str, Tensor]:
        """The word embeddings (n, width) of `PATCH_WORDS`, by role."""
        return {
            role: embeddings[torch.tensor([self.first(w) for w in words], device=embeddings.device)]
            for role, words in PATCH_WORDS.items()
        }


def chat_prompt(processor: Any, question: str, images: int = 1) -> str:
    """The single-turn prompt, by the processor's own chat template; it expands the image tokens itself."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
    return str(
        processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    )


def make_inputs(processor: Any, samples: Sequence[Sample]) -> Any:
    """One batch of prompts, as `model.generate` takes them."""
    return processor(
        images=[image for s in samples for image in s.images],
        text=[chat_prompt(processor, s.question, len(s.images)) for s in samples],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    )
