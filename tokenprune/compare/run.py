"""The whole comparison: arms asked in turn, times measured, everything on disk as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenprune.analysis.memory import content_digest
from tokenprune.api import report
from tokenprune.compare.answering import Asker
from tokenprune.compare.arms import CONTROLS, METHODS, Arm, check_budgets, make_arms, read_methods
from tokenprune.compare.questions import MATCHES, Match, Question
from tokenprune.compare.speed import WHATS, measure_times
from tokenprune.compare.store import Store
from tokenprune.compare.summary import Summary, summarise
from tokenprune.errors import BudgetError, ConfigError, UnsupportedModelError
from tokenprune.fingerprint import fingerprint
from tokenprune.profiles.known import known_profile


@dataclass(frozen=True)
class CompareOptions:
    """How to compare.

    Attributes:
        methods: "NAME" or "NAME,parameter=value,...".
        budgets: average retentions.
        controls: which stand beside them, of `CONTROLS`.
        batch_size: prompts per batch while answers are taken.
        max_new_tokens: of an answer.
        match: when an answer is right: "exact", or "contains" a right one.
        time_batches: batch sizes that are timed; none: nothing is.
        rounds: of timing.
        new_tokens: of the whole answer that is timed.

    Raises:
        ConfigError: says what it may be.
    """

    methods: Sequence[str] = METHODS
    budgets: Sequence[float] = (0.5, 0.25, 0.125)
    controls: Sequence[str] = CONTROLS
    batch_size: int = 8
    max_new_tokens: int = 32
    match: Match = "exact"
    time_batches: Sequence[int] = (1, 8)
    rounds: int = 5
    new_tokens: int = 32

    def __post_init__(self) -> None:
        read_methods(self.methods)
        check_budgets(self.budgets)
        for name in self.controls:
            if name not in CONTROLS:
                raise ConfigError(f"unknown control {name!r}; there are {', '.join(CONTROLS)}")
        if self.match not in MATCHES:
            raise ConfigError(f"match must be one of {', '.join(MATCHES)}, not {self.match!r}")
        for name in ("batch_size", "max_new_tokens", "rounds", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if any(size < 1 for size in self.time_batches):
            raise ConfigError(f"a batch size to time must be at least 1, not {min(self.time_batches)}")


@dataclass(frozen=True)
class Comparison:
    """What came out, and what it takes to draw more of it."""

    summary: Summary
    asker: Asker
    arms: Sequence[Arm]


@dataclass(frozen=True)
class Progress:
    """What is being done, and how many of how many steps (questions of an arm, arms' times) are done."""

    what: str
    done: int
    total: int


def compare(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    folder: Path,
    *,
    resume: bool = False,
    told: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> Comparison:
    """Ask everything under every arm, and time them.

    Args:
        model: stock, not wrapped.
        processor: its own.
        questions: see `load_questions`.
        folder: where answers and times are kept.
        resume: go on with what is in the folder; more methods and budgets may be asked for than before.
        told: called after every batch.
        **options: see `CompareOptions`.

    Raises:
        ConfigError: a wrong argument, or the folder holds another comparison.
    """
    asked = CompareOptions(**options)
    asker = Asker(model, processor, questions, asked.batch_size, asked.max_new_tokens)
    layers = len(asker.family.layers())
    arms = make_arms(model, asked.methods, asked.budgets, layers, asked.controls)
    data = content_digest([(q.pictures, q.text, q.answers) for q in questions])
    identity = {
        "model": fingerprint(model),
        "dtype": str(asker.inner.dtype),
        "questions": data,
        "max_new_tokens": asked.max_new_tokens,
    }
    store = Store(folder, identity, resume)
    for arm in arms:
        _answer(asker, arm, store, told)
    refused = {row["arm"] for row in store.rows("refused")}
    running = [arm for arm in arms if arm.key not in refused]
    _time(asker, running, store, asked, told)
    return Comparison(summarise(arms, questions, store, asked.match), asker, arms)


def _answer(asker: Asker, arm: Arm, store: Store, told: Callable[[Progress], None]) -> None:
    """Take an arm's answers, as far as they are missing."""
    done = frozenset(row["question"] for row in store.rows("answer") if row["arm"] == arm.key)
    refused = any(row["arm"] == arm.key for row in store.rows("refused"))
    if refused or len(done) == len(asker.questions):
        return
    _check_same(asker.model, arm, store)
    count = len(done)
    try:
        for batch in asker.ask(arm, done):
            if not count:
                store.add("arm", [{"arm": arm.key, "setting": _setting(asker.model)}])
            store.add("answer", ({"arm": arm.key, **asdict(answer)} for answer in batch))
            count += len(batch)
            told(Progress(arm.key, count, len(asker.questions)))
    except (BudgetError, ConfigError, UnsupportedModelError) as error:
        store.add("refused", [{"arm": arm.key, "reason": str(error)}])


def _setting(model: Any) -> dict[str, Any]:
    """What the wrapped model did last."""
    last = report(model)
    return {
        "method": last.method,
        "parameters": {name: str(value) for name, value in last.parameters.items()},
        "layers": list(last.layers_cut),
        "reads_text": last.reads_text,
        "profile": last.profile,
    }


def _check_same(model: Any, arm: Arm, store: Store) -> None:
    """Refuse to go on with answers under another profile."""
    held: Mapping[str, Any] | None = next(
        (r["setting"] for r in store.rows("arm") if r["arm"] == arm.key), None
    )
    if held is None or held["profile"] is None or arm.keep is None:
        return
    profile = known_profile(fingerprint(model), arm.keep)
    if profile is not None and profile.hash != held["profile"]:
        raise ConfigError(
            f"the answers of {arm.key!r} were begun under another profile than is known now; name another folder"
        )


def _time(
    asker: Asker,
    arms: Sequence[Arm],
    store: Store,
    asked: CompareOptions,
    told: Callable[[Progress], None],
) -> None:
    done = {(row["arm"], row["batch_size"], row["what"]) for row in store.rows("time")}
    plan = [(size, what) for size in asked.time_batches for what in WHATS]
    for number, (size, what) in enumerate(plan, 1):
        if not all((arm.key, size, what) in done for arm in arms):
            store.add("time", measure_times(asker, arms, size, what, asked.rounds, asked.new_tokens))
        told(Progress("times", number, len(plan)))
