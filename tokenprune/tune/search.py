"""The full search: Optuna over the methods' search spaces, drift as the objective, in studies that outlive a kill."""

from __future__ import annotations

import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import TrialState

from tokenprune.analysis.batches import batched
from tokenprune.analysis.memory import Memory, content_digest
from tokenprune.budget import Keep
from tokenprune.errors import BudgetError, ConfigError, UnsupportedModelError
from tokenprune.fingerprint import fingerprint
from tokenprune.profiles.profile import Profile
from tokenprune.tune.controls import control_drifts
from tokenprune.tune.drift import BatchDrift, check_metric, drifts, measure
from tokenprune.tune.making import make_profile
from tokenprune.tune.samplers import check_sampler, make_sampler
from tokenprune.tune.space import Range, Space, setting_of
from tokenprune.tune.starts import scheduled
from tokenprune.tune.studies import cached_storage, open_storage, open_study, storage_errors

LOG = logging.getLogger("tokenprune.tune")

Cost = Literal["flops", "latency"]
_TRIED = "tried"  # a trial's attribute: what was measured
_BEGUN = "begun"  # a study's attribute: the points it begins with, and what finding them cost
_FINALISTS = 5
FEW_TRIALS, FEW_SAMPLES = 30, 48
_IN_VAIN = 50  # trials in a row that were known or impossible end a search


@dataclass(frozen=True)
class Tried:
    """A setting that was measured.

    Attributes:
        number: of the trial.
        arguments: of `wrap`.
        drift: (samples,) as far as it was measured.
        value: mean drift; of a trial that was stopped early, what was to be expected.
        cost: FLOPs of the prefill as a share of the unpruned one's, or seconds per prompt; None where not searched.
        flops, seconds: of a prompt's prefill, mean.
    """

    number: int
    arguments: dict[str, Any]
    drift: NDArray[np.float64]
    value: float
    cost: float | None
    flops: float
    seconds: float

    @classmethod
    def of(cls, trial: Any) -> Tried:
        held = trial.user_attrs[_TRIED]
        return cls(
            trial.number,
            json.loads(json.dumps(held["arguments"])),  # as a storage gives it back, from every storage
            np.asarray(held["drift"]),
            trial.values[0],
            trial.values[1] if len(trial.values) > 1 else None,
            held["flops"],
            held["seconds"],
        )


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        profiles: of the best setting, or of the Pareto front, the least drift first.
        tried: every finished trial, in order.
        front: those on the Pareto front, as in `profiles`; the best alone where drift was the only objective.
        controls: drift of each sample, by control, at the budget of the first profile.
        held_out: drift of the fresh prompts, of the first profile ("found") and by control; empty without any.
        samples: prompts.
        passes: prefills of a prompt that this study cost, references included, but not the look at the first few that
            its space is made from.
        study: Optuna's own.
    """

    profiles: list[Profile]
    tried: list[Tried]
    front: list[Tried]
    controls: dict[str, NDArray[np.float64]]
    held_out: dict[str, NDArray[np.float64]]
    samples: int
    passes: int
    study: Any

    def cautions(self) -> list[str]:
        """What to think of before the result is relied on."""
        found = []
        if len(self.tried) < FEW_TRIALS:
            found.append(
                f"{len(self.tried)} trials are few: the search has hardly left its starting points; {FEW_TRIALS} or "
                f"more tell something (--resume --trials {2 * FEW_TRIALS})"
            )
        if self.samples < FEW_SAMPLES:
            found.append(
                f"{self.samples} samples are few: a setting found on 30 fitted them and not others; take about 100"
            )
        return found


@dataclass(frozen=True)
class Progress:
    """How far a search is: trials done and asked for, the least drift so far, seconds passed and to come.

    Before the first trial schedules are made from single cuts: `trials` is 0 then, and `done` counts what was measured.
    """

    done: int
    trials: int
    best: float
    seconds: float
    left: float


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        methods: which to search; None: all that have a search space.
        served: search what vLLM serves: one cut, before the LLM, without biases.
        metric: of drift, see `METRICS`.
        cost: a second objective: "flops" (share of the unpruned prefill's) or "latency" (seconds of a prompt's).
        sampler: a name of `SAMPLERS`.
        schedule: whether the search begins with the schedules of `starts.scheduled`, where stages are searched.
        trials: finished ones that the study shall have in all.
        passes: prefills of a prompt after which no further trial begins, as `Found.passes` counts them; None: no limit.
        seed: the sampler's follows from it, the trials in the storage, and `worker`.
        worker: number of this process among those that share a study, which the first of them makes; None: nobody does.
        batch_size: prompts per forward.
        stop_early: whether trials are stopped that are worse; never with `cost`.
        storage: see `open_storage`; "cache": an SQLite file in the user's cache folder.
        study: its name; None: made of what is asked.
        resume: go on with a study of that name.
        heartbeat: see `open_storage`.

    Raises:
        ConfigError: says what it may be.
    """

    methods: Sequence[str] | None = None
    served: bool = False
    metric: str = "cosine"
    cost: Cost | None = None
    sampler: str = "tpe"
    schedule: bool = True
    trials: int = 100
    passes: int | None = None
    seed: int = 0
    worker: int | None = None
    batch_size: int = 8
    stop_early: bool = True
    storage: str | None = None
    study: str | None = None
    resume: bool = False
    heartbeat: int = 30

    def __post_init__(self) -> None:
        check_metric(self.metric)
        check_sampler(self.sampler, self.objectives)
        if self.trials < 1:
            raise ConfigError(f"trials must be at least 1, not {self.trials}")
        if self.passes is not None and self.passes < 1:
            raise ConfigError(f"passes must be at least 1, not {self.passes}")

    @property
    def objectives(self) -> int:
        return 1 + (self.cost is not None)


def search(
    model: Any,
    calls: Sequence[Mapping[str, Any]],
    keep: Keep | Range,
    *,
    fresh: Sequence[Mapping[str, Any]] = (),
    memory: Memory | None = None,
    told: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Found:
    """Search the methods' parameters and cuts for the least drift of the last prompt position.

    References and the vision tower are computed once per sample; a trial is stopped as soon as it is worse than the
    best one on the samples seen so far (Wilcoxon signed-rank test, p < 0.1). Every point of the space meets the
    budget. The methods' defaults are tried first, and, where stages are searched, what a dynamic programme makes of
    single cuts.

    Source: VFlowOpt, arXiv 2508.05211, section 3.4, whose release recomputes everything at every trial.

    Args:
        model: stock, not wrapped.
        calls: inputs of one prompt each; no answers are needed. About 100: with the paper's 30 the best
            setting fitted the samples (docs/results.md).
        keep: the budget, an average over layers; with `cost` a range (low, high) that is searched too.
        fresh: other prompts. The best few are measured on them too, and the least drift over both is chosen: what a
            hundred settings were chosen by flatters the best. The profile says what was measured on these.
        memory: to share with other searches on the same model.
        told: called after every trial.
        **options: see `SearchOptions`.

    Returns:
        Profiles and what they were chosen from.

    Raises:
        ConfigError: a wrong argument, before anything is computed; a budget that nothing can meet.
    """
    asked_for = SearchOptions(**options)
    _check(keep, calls, asked_for.cost)
    memory = memory or Memory()
    low = keep[0] if isinstance(keep, tuple) else keep
    space = Space.of(setting_of(model, calls, low, memory), asked_for.methods, keep, asked_for.served)
    asked = {
        "model": fingerprint(model),
        "data": content_digest(*(dict(call) for call in calls)),
        "samples": len(calls),
        "keep": keep,
        "metric": asked_for.metric,
        "cost": asked_for.cost,
        "methods": space.describe(),
    }
    url = _url(asked_for, asked)
    with _interrupts(), _quietly(), storage_errors(url):
        batches = list(batched(calls, asked_for.batch_size))
        objective = _Objective(model, batches, space, asked_for, memory)
        study = _opened(asked, asked_for, objective, url, told)
        spent_anyway = len(calls) + study.user_attrs[_BEGUN]["passes"] + (1 + _FINALISTS) * len(fresh)
        _run(study, objective, spent_anyway, told)
        return _found(study, objective, list(batched(fresh, asked_for.batch_size)), asked)


def _check(keep: Keep | Range, calls: Sequence[Mapping[str, Any]], cost: Cost | None) -> None:
    if isinstance(keep, tuple) != (cost is not None):
        raise ConfigError("a range of budgets and a cost go together: the front says what each budget costs")
    if isinstance(keep, tuple) and not 0 < keep[0] < keep[1] <= 1:
        raise ConfigError(f"a range of budgets is two fractions, the lower first, not {keep}")
    if not calls:
        raise ConfigError("there are no samples to search on")


def _name(options: SearchOptions, asked: Mapping[str, Any]) -> str:
    return options.study or f"tokenprune-{content_digest(dict(asked))[:16]}"


def _url(options: SearchOptions, asked: Mapping[str, Any]) -> str | None:
    return cached_storage(_name(options, asked)) if options.storage == "cache" else options.storage


def _opened(
    asked: Mapping[str, Any],
    options: SearchOptions,
    objective: _Objective,
    url: str | None,
    told: Callable[[Progress], None] | None,
) -> Any:
    """The study, with its sampler and pruner; who opens it first says where it begins."""
    storage = open_storage(url, options.heartbeat)
    joins = options.resume or options.worker is not None
    study = open_study(_name(options, asked), asked, ["minimize"] * options.objectives, storage, joins)
    if _BEGUN not in study.user_attrs:
        points, passes = objective.space.defaults(), 0
        if options.schedule:
            start, count = time.monotonic(), 0

            def measured(*given: Any) -> NDArray[np.float64]:
                nonlocal count
                count += 1
                if told is not None:
                    told(Progress(count, 0, float("inf"), time.monotonic() - start, float("inf")))
                return objective.measure(*given)

            more, passes = scheduled(objective.space, objective.batches, measured)
            points += [point for point in more if point not in points]
        study.set_user_attr(_BEGUN, {"points": points, "passes": passes})
    known, first = len(study.get_trials(deepcopy=False)), study.user_attrs[_BEGUN]["points"]
    study.sampler = make_sampler(options.sampler, options.seed, known, options.worker or 0, first)
    study.pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=2)
    return study


class _Objective:
    """Drift (and cost) of a trial's setting."""

    def __init__(
        self,
        model: Any,
        batches: Sequence[Mapping[str, Any]],
        space: Space,
        options: SearchOptions,
        memory: Memory,
    ) -> None:
        self.model, self.batches, self.space = model, batches, space
        self.options, self.memory = options, memory
        self.stop_early = options.stop_early and options.cost is None

    def measure(
        self, batches: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
    ) -> NDArray[np.float64]:
        """Drift of a setting on any prompts."""
        return measure(self.model, batches, arguments, self.memory, self.options.metric)

    def controls(self, batches: Sequence[Mapping[str, Any]], keep: Keep) -> dict[str, NDArray[np.float64]]:
        """Drift of what looks at nothing, at the same budget."""
        return control_drifts(self.model, batches, keep, self.memory, self.options.metric)

    def __call__(self, trial: Any) -> float | tuple[float, float]:
        arguments = self.space.ask(trial)
        _refuse_known(trial)
        seen: list[BatchDrift] = []
        stopped = False
        try:
            for batch in drifts(self.model, self.batches, arguments, self.memory, self.options.metric):
                seen.append(batch)
                if self.stop_early and self._is_worse(trial, seen) and len(seen) < len(self.batches):
                    stopped = True
                    break
        except (BudgetError, ConfigError, UnsupportedModelError) as error:
            trial.set_user_attr("refused", str(error))
            raise optuna.TrialPruned(str(error)) from None
        _refuse_known(trial)  # where another worker was not done writing down what it tries
        drift = np.concatenate([batch.drift for batch in seen])
        flops, unpruned = sum(b.flops for b in seen), sum(b.flops_unpruned for b in seen)
        seconds = statistics.median(b.seconds / len(b.drift) for b in seen)
        trial.set_user_attr(
            _TRIED,
            {
                "arguments": arguments,
                "drift": drift.tolist(),
                "flops": flops / len(drift),
                "seconds": seconds,
            },
        )
        if self.options.cost is not None:
            return float(drift.mean()), flops / unpruned if self.options.cost == "flops" else seconds
        return self._expected(trial, drift) if stopped else float(drift.mean())

    def _is_worse(self, trial: Any, seen: Sequence[BatchDrift]) -> bool:
        start = sum(len(batch.drift) for batch in seen[:-1])
        for step, value in enumerate(seen[-1].drift, start):
            trial.report(float(value), step)
        return trial.should_prune()

    def _expected(self, trial: Any, drift: NDArray[np.float64]) -> float:
        """Of a trial that was stopped: the best one's drift, and how much worse this one was on the same samples.

        A mean over the few samples it has seen would flatter it where those are easy ones.
        """
        best = np.asarray(trial.study.best_trial.user_attrs[_TRIED]["drift"])
        return float(best.mean() + max(0.0, (drift - best[: len(drift)]).mean()))


def _refuse_known(trial: Any) -> None:
    """Give a trial up where an earlier one has, or is measuring, the same parameters."""
    known = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
    if any(other.number < trial.number and other.params == trial.params for other in known):
        trial.study.sampler.reseed_rng()  # another worker may have the same numbers
        raise optuna.TrialPruned("these parameters were tried already")


def _run(
    study: Any, objective: _Objective, spent_anyway: int, told: Callable[[Progress], None] | None
) -> None:
    """Try until enough trials are finished or passes spent; of these `spent_anyway` are not any trial's."""
    trials, limit = objective.options.trials, objective.options.passes
    start, before, in_vain = time.monotonic(), len(_finished(study)), 0

    def is_done(finished: Sequence[Any]) -> bool:
        spent = spent_anyway + _passes_of(finished)
        return len(finished) >= trials or (limit is not None and spent >= limit and len(finished) > 0)

    def after(study: Any, trial: Any) -> None:
        nonlocal in_vain
        in_vain = in_vain + 1 if trial.state == TrialState.PRUNED else 0
        finished = _finished(study)
        if is_done(finished) or in_vain >= _IN_VAIN:
            study.stop()
        if trial.state == TrialState.COMPLETE:
            LOG.info(
                "trial %d: drift %.4g, %s",
                trial.number,
                trial.values[0],
                trial.user_attrs[_TRIED]["arguments"],
            )
        if told is not None and finished:
            seconds, done = time.monotonic() - start, len(finished)
            left = seconds / max(1, done - before) * max(0, trials - done)
            told(Progress(done, trials, min(t.values[0] for t in finished), seconds, left))

    if not is_done(_finished(study)):
        study.optimize(objective, n_trials=None, callbacks=[after])
    if not _finished(study):
        refused = [t.user_attrs["refused"] for t in study.get_trials() if "refused" in t.user_attrs]
        raise ConfigError(
            f"nothing here can meet the budget: {refused[0] if refused else 'no trial finished'}"
        )


def _finished(study: Any) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _passes_of(trials: Sequence[Any]) -> int:
    return sum(len(trial.user_attrs[_TRIED]["drift"]) for trial in trials)


def _found(
    study: Any, objective: _Objective, fresh: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]
) -> Found:
    options = objective.options
    finished = _finished(study)
    tried = [Tried.of(trial) for trial in finished]
    whole = sorted((t for t in tried if len(t.drift) == asked["samples"]), key=lambda one: one.value)
    passes = asked["samples"] + study.user_attrs[_BEGUN]["passes"] + _passes_of(finished)
    checked: dict[int, NDArray[np.float64]] = {}
    if options.cost is not None:
        on_it = {trial.number for trial in study.best_trials}
        front = [one for one in whole if one.number in on_it]
    elif not fresh:
        front = whole[:1]
    else:
        for one in whole[:_FINALISTS]:
            checked[one.number] = objective.measure(fresh, one.arguments)
            passes += len(checked[one.number])
        front = [min(whole[:_FINALISTS], key=lambda t: np.concatenate([t.drift, checked[t.number]]).mean())]
        passes += len(checked[front[0].number])  # their references
    made = {
        "how": "tokenprune tune",
        "data": asked["data"],
        "samples": asked["samples"],
        "sampler": options.sampler,
        "seed": options.seed,
        "trials": len(tried),
    }
    profiles: list[Profile] = []
    shown: dict[str, NDArray[np.float64]] = {}
    held_out: dict[str, NDArray[np.float64]] = {}
    for keep, group in groupby(front, key=lambda one: one.arguments["keep"]):
        own = objective.controls(objective.batches, keep)
        shown = shown or own
        if checked:
            own = objective.controls(fresh, keep)
            held_out = held_out or {"found": checked[front[0].number], **own}
        profiles += [
            make_profile(
                objective.model,
                one.arguments,
                checked.get(one.number, one.drift),
                metric=options.metric,
                controls={name: float(drift.mean()) for name, drift in own.items()},
                made=made,
                flops=one.flops,
                seconds=one.seconds,
            )
            for one in group
        ]
    return Found(profiles, tried, front, shown, held_out, asked["samples"], passes, study)


@contextmanager
def _interrupts() -> Any:
    """Inside, an interrupt stays one: Optuna and SQLAlchemy stumble over it as they write, and raise something else."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise KeyboardInterrupt from error


@contextmanager
def _quietly() -> Any:
    """Optuna's own lines on stderr are not ours; errors are raised anyway."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", module="optuna")
            yield
    finally:
        optuna.logging.set_verbosity(level)
