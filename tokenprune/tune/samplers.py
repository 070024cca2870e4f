"""Optuna's samplers by name, seeded so that a resumed study goes on instead of starting anew."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna

from tokenprune.errors import ConfigError
from tokenprune.optional import check_installed


def _cmaes(seed: int) -> Any:
    check_installed(
        "the sampler 'cmaes'", "cmaes", extra="tune"
    )  # optuna asks for it at the first trial only
    return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=5, warn_independent_sampling=False)


SAMPLERS: dict[str, Callable[[int], Any]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, group=True, warn_independent_sampling=False
    ),
    "gp": lambda seed: optuna.samplers.GPSampler(
        seed=seed, deterministic_objective=True, warn_independent_sampling=False
    ),
    "cmaes": _cmaes,
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def check_sampler(name: str, objectives: int = 1) -> None:
    """Raises ConfigError where there is no such sampler, or where it cannot take several objectives."""
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    if name == "cmaes" and objectives > 1:
        raise ConfigError("the sampler 'cmaes' takes one objective; choose tpe, gp, nsga2 or random")


def make_sampler(
    name: str, seed: int, trials: int, worker: int, first: Sequence[Mapping[str, Any]] = ()
) -> Any:
    """A sampler whose seed follows from the study's, the trials in its storage, and the worker's number.

    Args:
        name: of `SAMPLERS`.
        seed: of the study.
        trials: in its storage.
        worker: number of this process.
        first: points that the study's first trials are.

    Raises:
        ConfigError: no such sampler, or a library it needs is missing.
    """
    check_sampler(name)
    own = int.from_bytes(hashlib.sha256(f"{seed} {trials} {worker}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _FirstPoints(SAMPLERS[name](own), first)


class _FirstPoints(optuna.samplers.BaseSampler):
    """Given points by the trials' numbers, then another sampler's.

    Optuna's own queue of trials is claimed twice where two workers read an SQLite file at once.
    """

    def __init__(self, sampler: Any, points: Sequence[Mapping[str, Any]]) -> None:
        self.sampler, self.points = sampler, points

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        if trial.number < len(self.points):
            return {}
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        if trial.number < len(self.points):
            return {}
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        given = self.points[trial.number] if trial.number < len(self.points) else {}
        if param_name in given:
            return given[param_name]
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Any, trial: Any) -> None:
        self.sampler.before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self.sampler.reseed_rng()
