"""From answers and times to what can be said: accuracy, what a method loses to, loyalty, group A, memory, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenprune.compare.arms import CONTROLS, DOWNSAMPLE, NONE, Arm
from tokenprune.compare.questions import Match, Question, is_right, normal
from tokenprune.compare.statistics import Difference, difference, mean_interval, wilson
from tokenprune.compare.store import Store

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Share:
    """A share of `total` questions, with its 95 % interval: bootstrapped over pictures; Wilson's where none or all
    are."""

    value: float
    low: float
    high: float
    total: int

    @classmethod
    def of(cls, outcomes: BoolArray, clusters: Sequence[str]) -> Share | None:
        """None where there are no questions."""
        if not len(outcomes):
            return None
        share = float(outcomes.mean())
        bounds = mean_interval(outcomes, clusters) if 0 < share < 1 else wilson(outcomes, clusters)
        return cls(share, *bounds, len(outcomes))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        name, keep, control: see `Arm`.
        refused: why it could not run, or "".
        setting: what ran: method, parameters, layers of the cuts, the profile's hash.
        kept: average retention that came of it, mean over questions.
        kv: bytes of keys and values after a prompt, mean; kv_share: of the unpruned one's.
        flops: of the decoder's prefill as a share of the unpruned one's.
        drift: mean.
        accuracy: of all questions; None without right answers.
        families: the same by family.
        group_a: accuracy on the questions that the unpruned model gets right and the smaller picture wrong.
        loyalty: share of questions answered as the unpruned model answers.
        against: accuracy minus each control's (and the unpruned model's) at the same budget, paired.
        times: by (batch size, what): ms, speedup, p20, p80; see `measure_times`.
    """

    name: str
    keep: float | None
    control: bool
    refused: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)
    kept: float = float("nan")
    kv: float = float("nan")
    kv_share: float = float("nan")
    flops: float = float("nan")
    drift: float = float("nan")
    accuracy: Share | None = None
    families: Mapping[str, Share] = field(default_factory=dict)
    group_a: Share | None = None
    loyalty: Share | None = None
    against: Mapping[str, Difference] = field(default_factory=dict)
    times: Mapping[tuple[int, str], Mapping[str, float]] = field(default_factory=dict)

    @property
    def loses_to(self) -> list[str]:
        """Controls that are better by more than the interval."""
        return [name for name, found in self.against.items() if name != NONE and found.high < 0]


@dataclass(frozen=True)
class Summary:
    """Attributes:
    rows: in the order of the arms.
    questions: that were asked.
    answers: by arm's key, what was said to each question; arms that were refused are not there.
    """

    rows: list[Row]
    questions: Sequence[Question]
    answers: Mapping[str, list[str]]
    match: Match = "exact"

    @property
    def budgets(self) -> list[float]:
        return sorted({row.keep for row in self.rows if row.keep is not None}, reverse=True)

    @property
    def names(self) -> list[str]:
        """Of methods, then of controls."""
        own = [row.name for row in self.rows if row.keep is not None]
        return sorted(dict.fromkeys(own), key=lambda name: name in CONTROLS)

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(q.family for q in self.questions if q.family))

    @cached_property
    def whole(self) -> Row:
        return next(row for row in self.rows if row.name == NONE)

    def at(self, name: str, keep: float) -> Row | None:
        return next((row for row in self.rows if (row.name, row.keep) == (name, keep)), None)

    def right(self, key: str) -> BoolArray:
        """(questions,) whether an arm is right."""
        said = zip(self.answers[key], self.questions, strict=True)
        return np.array([is_right(text, q.answers, self.match) for text, q in said])


def summarise(arms: Sequence[Arm], questions: Sequence[Question], store: Store, match: Match) -> Summary:
    """What the store says of the arms; those it has no whole set of answers of are left out."""
    settings = {row["arm"]: row["setting"] for row in store.rows("arm")}
    refused = {row["arm"]: row["reason"] for row in store.rows("refused")}
    given: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in store.rows("answer"):
        given.setdefault(row["arm"], {})[row["question"]] = row
    times: dict[str, dict[tuple[int, str], Mapping[str, float]]] = {}
    for row in store.rows("time"):
        times.setdefault(row["arm"], {})[row["batch_size"], row["what"]] = row
    numbers = range(len(questions))
    answered = {key: [own[i] for i in numbers] for key, own in given.items() if len(own) == len(questions)}
    known = Summary([], questions, {k: [a["text"] for a in own] for k, own in answered.items()}, match)
    rows = []
    for arm in arms:
        own_times = times.get(arm.key, {})
        if arm.key in refused:
            rows.append(Row(arm.name, arm.keep, arm.is_control, refused[arm.key]))
        elif arm.key in answered:
            setting = settings.get(arm.key, {})
            rows.append(_row(arm, known, answered, setting, own_times))
    return Summary(rows, questions, known.answers, match)


def _row(
    arm: Arm,
    known: Summary,
    answered: Mapping[str, Sequence[Mapping[str, Any]]],
    setting: Mapping[str, Any],
    times: Mapping[tuple[int, str], Mapping[str, float]],
) -> Row:
    def mean(name: str, key: str) -> float:
        return float(np.mean([a[name] for a in answered[key]]))

    pictures = [q.pictures for q in known.questions]
    as_whole = [
        normal(a) == normal(b) for a, b in zip(known.answers[arm.key], known.answers[NONE], strict=True)
    ]
    row: dict[str, Any] = {
        "setting": setting,
        **{name: mean(name, arm.key) for name in ("kept", "kv", "flops", "drift")},
        "kv_share": mean("kv", arm.key) / mean("kv", NONE),
        "loyalty": Share.of(np.array(as_whole), pictures),
        "times": times,
    }
    if known.questions[0].answers:
        row |= _accuracy(arm, known, pictures)
    return Row(arm.name, arm.keep, arm.is_control, **row)


def _accuracy(arm: Arm, known: Summary, pictures: Sequence[str]) -> dict[str, Any]:
    right, whole = known.right(arm.key), known.right(NONE)

    def share(chosen: BoolArray) -> Share | None:
        return Share.of(right[chosen], [p for p, is_in in zip(pictures, chosen, strict=True) if is_in])

    found: dict[str, Any] = {
        "accuracy": Share.of(right, pictures),
        "families": {f: share(np.array([q.family == f for q in known.questions])) for f in known.families},
    }
    if arm.keep is None:
        return found
    others = {name: Arm(name, arm.keep).key for name in CONTROLS if name != arm.name}
    others = {NONE: NONE, **{name: key for name, key in others.items() if key in known.answers}}
    found["against"] = {name: difference(right, known.right(key), pictures) for name, key in others.items()}
    if DOWNSAMPLE in others:
        found["group_a"] = share(whole & ~known.right(others[DOWNSAMPLE]))
    return found
