"""Drift, quick tuning, and "auto": what a model stands is found without labels, kept, and taken."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import tokenprune
from tokenprune import ConfigError, Profile, UntestedWarning
from tokenprune.analysis.memory import Memory, last_state
from tokenprune.fingerprint import fingerprint
from tokenprune.models.base import Family
from tokenprune.models.llava import Llava
from tokenprune.profiles.known import known_profile, remember_profile
from tokenprune.profiles.profile import Measured, ProfileCut
from tokenprune.tune import METRICS, measure, quick

ROWS = [["text:4", "image", "text:5"]]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava(layers=6)


def calls(model: Any, count: int = 16) -> list[Any]:
    return [tiny.inputs(model, ROWS, seed=seed) for seed in range(count)]


# -- drift -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_drift_is_the_formula(model: Any, metric: str) -> None:
    prompts = calls(model, 3)
    arguments = {"method": "random", "layer": 1, "keep": 0.4}
    found = measure(model, prompts, arguments, Memory(), metric)
    for value, inputs in zip(found, prompts, strict=True):
        whole = last_state(model, inputs)
        with tokenprune.pruned(model, **arguments):
            cut = last_state(model, inputs)
        a, b = (np.asarray(x.state[0], dtype=np.float64) for x in (cut, whole))
        p, q = (np.exp(x.logits[0].double().log_softmax(-1).numpy()) for x in (whole, cut))
        wanted = {
            "cosine": 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b),
            "relative_l2": np.linalg.norm(a - b) / np.linalg.norm(b),
            "kl": float((p * np.log(p / q)).sum()),
            "cauchy_schwarz": -np.log(p @ q / np.linalg.norm(p) / np.linalg.norm(q)),
        }[metric]
        assert value == pytest.approx(wanted, rel=1e-6, abs=1e-9) and value > 0
    everything = measure(model, prompts, {"method": "none"}, Memory(), metric)
    assert np.abs(everything).max() < 1e-9
    assert not tokenprune.is_wrapped(model)


def test_an_unknown_metric(model: Any) -> None:
    with pytest.raises(ConfigError, match="unknown drift 'l3'; choose one of cosine"):
        measure(model, calls(model, 1), {"method": "none"}, Memory(), "l3")


# -- quick -------------------------------------------------------------------------------------------------------------


def test_quick_keeps_the_least_drift_and_says_how(model: Any) -> None:
    seen: list[str] = []
    profile, trials = quick(
        model, calls(model), 0.4, told=lambda trial, done, expected: seen.append(trial.name())
    )
    whole = [t for t in trials if len(t.drift) == 16]
    assert trials[0].mean == min(t.mean for t in whole) and len(whole) < len(trials)
    assert {t.arguments["method"] for t in whole} >= {"random", "uniform"}  # controls see all samples
    assert profile.method == trials[0].arguments["method"] and profile.model == fingerprint(model)
    assert profile.measured is not None and profile.measured.drift == trials[0].mean
    assert profile.measured.drift <= profile.measured.controls["random"]
    assert profile.made.samples == 16 and profile.made.trials > 20 and seen
    again, _ = quick(model, calls(model), 0.4)
    assert again == profile
    with tokenprune.pruned(model, profile=profile), torch.no_grad():
        model(**calls(model, 1)[0])
        assert tokenprune.report(model).retention_average == pytest.approx(0.4, abs=0.06)


def test_quick_refuses_what_cannot_be(model: Any) -> None:
    with pytest.raises(ConfigError, match="at least 4 samples"):
        quick(model, calls(model, 3), 0.4)
    assert not tokenprune.is_wrapped(model)


# -- auto --------------------------------------------------------------------------------------------------------------


def known(model: Any, keep: float | int, **more: Any) -> Profile:
    profile = Profile(method="vflowopt", parameters={"a": 2.0}, keep=keep, model=fingerprint(model), **more)
    remember_profile(profile)
    return profile.sealed()


def told(model: Any, **arguments: Any) -> Any:
    with tokenprune.pruned(model, **arguments), torch.no_grad():
        model(**calls(model, 1)[0])
        return tokenprune.report(model)


def test_auto_without_a_profile_warns_once_and_says_so(model: Any) -> None:
    with pytest.warns(
        UntestedWarning, match=r"VFlowOpt with its defaults is taken.*tokenprune tune"
    ) as caught:
        report = told(model, keep=0.5)
    assert len(caught) == 1 and report.method == "vflowopt" and report.parameters["size_term"]
    assert report.layers_cut == (0, 2, 4) and "untested on this model" in str(report)
    for arguments in ({"layer": 2}, {"even": 0.3}, {"method": "vflowopt"}, {"cuts": [(1, None)]}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UntestedWarning)
            assert told(model, keep=0.5, **arguments).method == "vflowopt"


def test_auto_where_vflowopt_cannot_run_as_it_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes no size term; a tower that nobody can look into leaves an even grid before the LLM."""
    monkeypatch.setattr("tokenprune.auto.takes_biases", lambda _: False)
    with pytest.warns(
        UntestedWarning, match="VFlowOpt without its size term, which sdpa does not take, is taken"
    ):
        report = told(model, keep=0.5)
    assert report.method == "vflowopt" and not report.parameters["size_term"]
    monkeypatch.setattr(Llava, "vision_tap", Family.vision_tap)
    with pytest.warns(UntestedWarning, match=r"even grid .*nobody can look into the tower of llava models"):
        report = told(model, keep=0.5)
    assert report.method == "uniform" and report.layers_cut == (0,)


# Every source of cuts and budget, then an override of the budget: what was asked stays what was asked.
SOURCES: dict[str, Any] = {
    "auto": {"keep": 0.4},
    "keep": {"method": "vflowopt", "keep": 0.4},
    "layer": {"method": "uniform", "layer": 1, "keep": 0.4},
    "cuts": {"method": "uniform", "cuts": [(0, 0.5), (2, None)], "keep": 0.4},
    "profile": {"profile": "solved"},
    "profile and keep": {"profile": "solved", "keep": 0.5},
    "fixed profile": {"profile": "fixed"},
    "fixed profile and its keep": {"profile": "fixed", "keep": 0.4},
    "fixed profile and layer": {"profile": "fixed", "layer": 1},
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_was_asked_is_never_rewritten(source: str, model: Any) -> None:
    known(
        model, 0.4, cuts=(ProfileCut(layer=0, keep=0.5), ProfileCut(layer=2, keep=0.4), ProfileCut(layer=4))
    )
    made = {
        "solved": Profile(method="uniform", keep=0.4, model=fingerprint(model), cuts=(ProfileCut(layer=0),)),
        "fixed": Profile(
            method="uniform",
            keep=0.4,
            model=fingerprint(model),
            cuts=(ProfileCut(layer=0, keep=0.45), ProfileCut(layer=2, keep=0.35)),
        ),
    }
    arguments = {**SOURCES[source]}
    if "profile" in arguments:
        arguments["profile"] = made[arguments["profile"]]
    call = calls(model, 1)[0]

    def now() -> Any:
        with torch.no_grad():
            model(**call)
        report = tokenprune.report(model)
        return report.method, report.layers_cut, report.kept, report.images[0].average

    with tokenprune.pruned(model, **arguments):
        first = now()
        assert first[3] == pytest.approx(25 * (0.5 if source == "profile and keep" else 0.4), abs=1.2)
        for keep in (0.3, 0.2, 10):
            if isinstance(keep, float) and keep < 0.25 and "layer" in arguments:
                continue  # a cut at layer 1 of 6 spends more
            with tokenprune.override(model, keep=keep):
                method, layers, _, average = now()
                assert (method, layers) == first[:2] or isinstance(keep, int)
                assert average == pytest.approx(keep * 25 if isinstance(keep, float) else keep, abs=1.2)
                with tokenprune.override(model, method="auto", keep=0.35):
                    assert now()[0] == "vflowopt" and tokenprune.report(model).profile is not None
                with tokenprune.override(model, profile=made["fixed"]):
                    assert now()[:2] == ("uniform", (0, 2))
                with tokenprune.override(model, method="random", layer=0):
                    assert now()[0] == "random" and tokenprune.report(model).profile is None
                with tokenprune.override(model, method="none"):
                    assert now()[0] == "none"
        assert now() == first


def test_auto_takes_the_profile_nearest_from_above(model: Any) -> None:
    for keep in (0.2, 0.4, 0.8):
        known(model, keep)
    own = fingerprint(model)
    for asked, taken in ((0.1, 0.2), (0.2, 0.2), (0.3, 0.4), (0.5, 0.8), (0.9, 0.8)):
        found = known_profile(own, asked)
        assert found is not None and found.keep == taken
    report = told(model, keep=0.3)
    assert report.method == "vflowopt" and report.parameters["a"] == 2.0
    assert report.images[0].average == pytest.approx(0.3 * 25, abs=1)
    assert report.profile is not None and "profile" in report.layer_reason
    assert known_profile("0" * 32, 0.3) is None


def test_auto_solves_fixed_cuts_anew(model: Any) -> None:
    known(
        model, 0.4, cuts=(ProfileCut(layer=0, keep=0.5), ProfileCut(layer=2, keep=0.4), ProfileCut(layer=4))
    )
    assert told(model, keep=0.2).images[0].kept[:2] == (6, 5)


def test_auto_never_picks_what_lost_to_random(model: Any) -> None:
    known(model, 0.4, measured=Measured(drift=0.2, controls={"random": 0.1}))
    assert known_profile(fingerprint(model), 0.4) is None


def test_a_broken_file_in_the_cache_is_named(model: Any, cache: Path) -> None:
    known(model, 0.4)
    (path,) = (cache / "profiles").glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "keep": 0.3}))
    with pytest.raises(ConfigError, match=f"{path.name} is no pruning profile"):
        tokenprune.wrap(model, keep=0.4)
    assert not tokenprune.is_wrapped(model)


def test_bundled_profiles_are_the_testbeds() -> None:
    from tokenprune.profiles.known import BUNDLED
    from tokenprune_testbed import MODEL_DIR, load

    paths = sorted(BUNDLED.glob("*.json"))
    assert paths and all(Profile.load(path).measured is not None for path in paths)
    if not (MODEL_DIR / "config.json").is_file():
        pytest.skip("no checkpoint in this checkout")
    own = fingerprint(load("small")[0])
    for keep in (0.33, 0.22, 0.11):
        profile = known_profile(own, keep)
        assert profile is not None and profile.keep == keep and profile.method == "stages"
