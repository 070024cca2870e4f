"""Questions about pictures, with right answers where there are any."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenprune import testbeds
from tokenprune.analysis.calibration import load_calibration
from tokenprune.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

Match = Literal["exact", "contains"]
MATCHES: tuple[Match, ...] = ("exact", "contains")


@dataclass(frozen=True)
class Question:
    """Attributes:
    images: RGB.
    text: the question.
    answers: right ones; empty where none is known.
    family: what kind of question it is; "" where the data do not say.
    pictures: digest of the images: questions about the same ones stand or fall together.
    """

    images: tuple[Image.Image, ...]
    text: str
    answers: tuple[str, ...]
    family: str
    pictures: str


def load_questions(source: str | Path, limit: int, *, seed: int = 0) -> list[Question]:
    """Up to `limit` questions of a source.

    Args:
        source: as for `load_calibration`, but "testbed" and "testbed:NAME" are held-out questions.
        limit: how many.
        seed: which ones.

    Raises:
        ConfigError: nothing usable there, or answers to some questions only.
    """
    testbed = testbeds.named_by(str(source))
    if testbed is not None:
        questions = _held_out(testbed, limit, seed)
    else:
        drawn = load_calibration(source, limit, seed=seed)
        questions = [_question(s.images, s.prompt, s.answers, s.family) for s in drawn]
    unanswered = sum(not q.answers for q in questions)
    if 0 < unanswered < len(questions):
        raise ConfigError(
            f"{unanswered} of {len(questions)} questions in {str(source)!r} have no answer; give all one, or none"
        )
    return questions


def _held_out(testbed: testbeds.Testbed, limit: int, seed: int) -> list[Question]:
    from PIL import Image

    return [
        _question([Image.fromarray(i) for i in s.images], s.question, (s.answer,), s.family)
        for s in testbed.questions(limit, seed)
    ]


def _question(images: Sequence[Image.Image], text: str, answers: tuple[str, ...], family: str) -> Question:
    digest = hashlib.sha256()
    for image in images:
        digest.update(str(image.size).encode() + image.tobytes())
    return Question(tuple(images), text, answers, family, digest.hexdigest()[:16])


def is_right(answer: str, right: Sequence[str], match: Match = "exact") -> bool:
    """Whether an answer is a right one, or contains one; case, articles and outer punctuation do not count."""
    own = normal(answer)
    if match == "exact":
        return own in map(normal, right)
    return any(f" {normal(one)} " in f" {own} " for one in right)


def normal(text: str) -> str:
    """Lower-case words without articles and the punctuation around them."""
    words = (word.strip(string.punctuation) or word for word in text.casefold().split())
    return " ".join(re.sub(r"^(a|an|the) ", "", " ".join(words)).split())
