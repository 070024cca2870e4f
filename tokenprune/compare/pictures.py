"""Kept-token pictures for the report: one question under every arm, and where each method fails first."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from tokenprune.api import pruned, report
from tokenprune.compare.answering import Asker
from tokenprune.compare.arms import CONTROLS, DOWNSAMPLE, NONE, Arm
from tokenprune.compare.summary import Summary
from tokenprune.draw import tile

_WIDTH = 640


@dataclass(frozen=True)
class Shown:
    """One picture.

    Attributes:
        name, keep: of the arm.
        question: its number.
        said: what the arm answered.
        image: as a data URL.
    """

    name: str
    keep: float
    question: int
    said: str
    image: str


@dataclass(frozen=True)
class Pictures:
    """What the report shows.

    Attributes:
        kept: one question under every arm.
        failures: where each method fails first.
        trouble: why there are none, or not all.
    """

    kept: Sequence[Shown] = ()
    failures: Sequence[Shown] = ()
    trouble: str = ""


def draw_pictures(asker: Asker, arms: Sequence[Arm], summary: Summary) -> Pictures:
    """All of them; what goes wrong with one costs that one and is said, for the numbers are there already."""
    kept: list[Shown] = []
    failures: list[Shown] = []
    try:
        kept += one_question(asker, arms, summary)
        failures += first_failures(asker, arms, summary)
    except Exception as error:  # whatever Pillow and the layouts of new families come up with
        return Pictures(kept, failures, " ".join(f"{type(error).__name__}: {error}".split()))
    return Pictures(kept, failures)


def one_question(asker: Asker, arms: Sequence[Arm], summary: Summary) -> list[Shown]:
    """What every arm keeps of one question's pictures at the budget in the middle, the smaller picture left out.

    The question is the one on which the arms disagree most among those the unpruned model gets right.
    """
    keep = summary.budgets[len(summary.budgets) // 2]
    own = [a for a in arms if a.keep == keep and a.name != DOWNSAMPLE and a.key in summary.answers]
    if not own:
        return []
    number = 0
    if summary.questions[0].answers:
        right = torch.tensor([summary.right(arm.key).tolist() for arm in own], dtype=torch.float)
        split = right.std(0, correction=0) + torch.from_numpy(summary.right(NONE))
        number = int(split.argmax())
    return [_shown(asker, arm, number, summary) for arm in own]


def first_failures(asker: Asker, arms: Sequence[Arm], summary: Summary) -> Iterator[Shown]:
    """Per method, a question that it gets wrong and the unpruned model right, at the largest budget that has one."""
    if not summary.questions[0].answers:
        return
    whole = summary.right(NONE)
    done: set[str] = set()
    for arm in arms:  # the largest budgets come first
        if arm.name in (*CONTROLS, NONE, *done) or arm.key not in summary.answers:
            continue
        wrong = (whole & ~summary.right(arm.key)).nonzero()[0]
        if len(wrong):
            done.add(arm.name)
            yield _shown(asker, arm, int(wrong[0]), summary)


def kept_of_question(asker: Asker, arm: Arm, number: int) -> Image.Image:
    """What an arm keeps of a question's pictures, side by side."""
    with asker.memory.features(asker.model), pruned(asker.model, **arm.arguments), torch.inference_mode():
        asker.inner(**asker.inputs(arm, [number]), use_cache=True, logits_to_keep=1)
        told = report(asker.model)
    drawn = told.draw(asker.questions[number].images, processor=asker.processor)
    return tile(drawn, columns=len(drawn))


def _shown(asker: Asker, arm: Arm, number: int, summary: Summary) -> Shown:
    assert arm.keep is not None
    picture = kept_of_question(asker, arm, number)
    return Shown(arm.name, arm.keep, number, summary.answers[arm.key][number], _data_url(picture))


def _data_url(picture: Image.Image) -> str:
    picture.thumbnail((_WIDTH, _WIDTH))
    held = io.BytesIO()
    picture.convert("RGB").save(held, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()
