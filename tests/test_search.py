"""The search: every point meets the budget, studies repeat and resume, workers share, nobody loses a trial."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sqlalchemy import make_url

import tiny
import tokenprune
from search_worker import ROWS, STUDY
from tokenprune import ConfigError
from tokenprune.analysis.memory import Memory
from tokenprune.budget import Cut, average_kept, plan_counts
from tokenprune.methods import METHODS, EntropyPrune, VFlowOpt
from tokenprune.profiles.profile import Profile
from tokenprune.space import OneOf, Real, Setting, Whole, spend, spent_ratios
from tokenprune.tune import measure, stages
from tokenprune.tune.schedule import schedule
from tokenprune.tune.search import Found, search
from tokenprune.tune.space import setting_of
from tokenprune.tune.studies import cached_storage, open_storage

WORKER = Path(__file__).with_name("search_worker.py")
STATES = optuna.trial.TrialState
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava(layers=6)


@pytest.fixture(scope="module")
def calls(model: Any) -> list[Any]:
    return [tiny.inputs(model, ROWS, seed=seed) for seed in range(6)]


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory()


def run(model: Any, calls: list[Any], memory: Memory, **more: Any) -> Found:
    given = {"keep": 0.4, "methods": ["vflowopt"], "trials": 6, "batch_size": 3, **more}
    return search(model, calls, given.pop("keep"), memory=memory, **given)


# -- the space ---------------------------------------------------------------------------------------------------------


@given(
    st.data(),
    st.integers(3, 40),
    st.floats(0.05, 1.0),
    st.integers(64, 3000),
    st.sampled_from(["vflowopt", "stages"]),
)
def test_every_point_meets_the_budget(data: Any, layers: int, keep: float, n: int, name: str) -> None:
    assume(keep * n >= 25)  # else 0.05 of the budget, what the last cut keeps at least, is less than a token
    setting = Setting(layers, 1, keep, grid_side=24, attention_peak=30.0)
    of = VFlowOpt if name == "vflowopt" else stages
    space = of.search_space(setting)
    assert space is not None
    point: dict[str, Any] = {}
    for what, d in space.items():
        if isinstance(d, Real):
            point[what] = data.draw(st.floats(d.low, d.high))
        else:
            drawn = st.sampled_from(d.values) if isinstance(d, OneOf) else st.integers(d.low, d.high)
            point[what] = data.draw(drawn)
    found = of.arguments_at(point, setting)
    given_cuts = found.get("cuts") or [(own[0], own[2]) for own in found["stages"]]
    cuts = [Cut(*cut) for cut in given_cuts]
    # As the runtime plans: what rounding the shares of earlier cuts costs is less than a token.
    counts = plan_counts(n, layers, cuts, keep, nearest=True)
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert average_kept(n, layers, cuts, counts) == pytest.approx(keep * n, abs=1.0)


@given(st.integers(4, 40), st.floats(0.05, 0.9), st.floats(0, 1), st.floats(0, 1))
def test_ratios_are_what_spends_so(layers: int, keep: float, first: float, second: float) -> None:
    setting = Setting(layers, 1, keep, grid_side=24)
    at = (0, layers // 3, layers // 2 + 1)
    shares = [share / keep for _, share in spend(at, (first, second), setting) if share is not None]
    assert spend(at, spent_ratios(at, shares, setting), setting)[1][1] == pytest.approx(keep * shares[1])


def test_the_default_of_stages_spends_as_vflowopt_does() -> None:
    setting = Setting(30, 1, 0.2, grid_side=24, attention_peak=3.0)
    space = stages.search_space(setting)
    assert space is not None
    found = stages.arguments_at({name: own.default for name, own in space.items()}, setting)
    wanted = VFlowOpt().default_cuts("llava", 30, 0.2)[0]
    assert found["method"] == "vflowopt" and [cut[0] for cut in found["cuts"]] == [
        cut.layer for cut in wanted
    ]
    assert found["cuts"][0][1] == pytest.approx(wanted[0].keep)
    without = replace(setting, attention_peak=None, scored=False)
    space = stages.search_space(without)
    assert space is not None and "t" not in space and "reads1" not in space
    found = stages.arguments_at({name: own.default for name, own in space.items()}, without)
    assert {own[1] for own in found["stages"]} == {"merge"}
    unbiased = replace(without, biases=False)
    found = stages.arguments_at({name: own.default for name, own in space.items()}, unbiased)
    assert {own[1] for own in found["stages"]} == {"cdpruner"}
    assert stages.search_space(replace(setting, num_layers=2)) is None


# -- schedules ---------------------------------------------------------------------------------------------------------


def brute_force(drifts: dict[tuple[int, float], float], layers: int, keep: float, most: int) -> float:
    """The least sum of what cuts add, over all schedules."""
    at = sorted({layer for layer, _ in drifts})
    shares = sorted({share for _, share in drifts} | {1.0}, reverse=True)
    best = np.inf
    for path in itertools.product(shares, repeat=len(at)):
        widths = np.diff([*at, layers])
        made = sum(a != b for a, b in zip((1.0, *path), path, strict=False))
        if list(path) != sorted(path, reverse=True) or path[0] == 1.0 or made > most:
            continue
        if sum(w * share for w, share in zip(widths, path, strict=True)) > keep * layers + 1e-9:
            continue
        cost = 0.0
        for layer, before, after in zip(at, (1.0, *path), path, strict=False):
            level = {
                share: max(drifts.get((layer, s), 0.0) for s in shares if s >= share) for share in shares
            }
            cost += level[after] - level[before]
        best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_schedule_is_the_best_of_all(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    shares = (0.6, 0.3, 0.1)
    drifts = {(layer, share): float(rng.random() / share) for layer in (0, 2, 5, 6) for share in shares}
    found = schedule(drifts, 8, 0.4, most)
    assert found[0][0] == 0 and len(found) <= most
    cost, before = 0.0, 1.0
    for layer, share in found:
        level = [max([drifts[layer, s] for s in shares if s >= own], default=0.0) for own in (share, before)]
        cost, before = cost + level[0] - level[1], share
    assert cost == pytest.approx(brute_force(drifts, 8, 0.4, most))


def test_schedules_begin_a_search(model: Any, calls: list[Any], memory: Memory) -> None:
    found = run(model, calls, memory, methods=["stages"], trials=1)
    begun = found.study.user_attrs["begun"]
    assert begun["passes"] > 0 and len(begun["points"]) > 4
    assert found.passes == 6 + begun["passes"] + 6
    assert found.tried[0].arguments["method"] == "vflowopt"
    plain = run(model, calls, memory, methods=["stages"], trials=1, schedule=False)
    assert len(plain.study.user_attrs["begun"]["points"]) == 1 and plain.passes == 12
    # A small budget of few tokens, which some cells cannot meet, and a count have none, or fewer.
    counted = run(model, calls, memory, methods=["stages"], trials=1, keep=9)
    assert counted.study.user_attrs["begun"]["passes"] == 0
    for point in begun["points"]:
        own = {name.removeprefix("stages."): value for name, value in point.items()}
        assert stages.arguments_at(own, Setting(6, 2, 0.4, 5, 3.0))


@pytest.mark.parametrize("layers", [6, 16, 28, 32])
@pytest.mark.parametrize("keep", [0.11, 0.25, 0.5, 60])
def test_single_cuts_of_a_space_can_meet_the_budget(layers: int, keep: float | int) -> None:
    setting = Setting(layers, 2, keep, grid_side=24, attention_peak=3.0)
    for name, cls in METHODS.items():
        for dimension in (cls.search_space(setting) or {}).values():
            if isinstance(dimension, Whole):
                lowest = 1 if keep == 0.11 and layers == 6 else 0
                assert max(lowest, cls.min_layer) <= dimension.low + 1 and dimension.low <= dimension.default
                if dimension.high > 1:
                    plan_counts(576, layers, [Cut(dimension.high)], keep if isinstance(keep, float) else 300)
        assert name != "random" or cls.search_space(setting) is None
    sources = EntropyPrune.search_space(setting)["source"]
    assert isinstance(sources, OneOf) and sources.default == "query"


def test_the_space_is_seen_on_the_calls(model: Any, calls: list[Any]) -> None:
    before = Memory()
    setting = setting_of(model, calls, 0.4, before)
    assert (setting.num_layers, setting.grid_side, setting.default_layer) == (6, 5, 2)
    assert setting.attention_peak is not None and setting.attention_peak > 1
    assert not tokenprune.is_wrapped(model)
    found = replace(setting, attention_peak=None)
    assert VFlowOpt.search_space(found) is None


# -- one study ---------------------------------------------------------------------------------------------------------


def test_the_best_is_what_measuring_says_and_becomes_a_profile(
    model: Any, calls: list[Any], memory: Memory
) -> None:
    seen: list[Any] = []
    found = run(model, calls, memory, trials=12, told=seen.append)
    assert [p.done for p in seen] == list(range(1, 13)) and seen[-1].left == 0
    best = found.front[0]
    assert len(best.drift) == 6 and best.value == min(p.value for p in found.tried)
    again = measure(model, calls, best.arguments, Memory())
    np.testing.assert_allclose(best.drift, again, atol=1e-6)
    (profile,) = found.profiles
    assert profile.measured is not None and profile.measured.drift == pytest.approx(best.value)
    assert profile.measured.controls.keys() == {"random", "uniform"}
    assert profile.made.trials == 12 and profile.made.samples == 6 and profile.made.sampler == "tpe"
    assert profile.measured.flops and profile.measured.seconds
    with tokenprune.pruned(model, profile=profile):
        np.testing.assert_allclose(best.drift, measure_wrapped(model, calls, memory), atol=1e-6)
    assert found.passes == 6 + sum(len(one.drift) for one in found.tried)
    assert not tokenprune.is_wrapped(model)


def measure_wrapped(model: Any, calls: list[Any], memory: Memory) -> list[float]:
    from tokenprune.analysis.memory import last_state
    from tokenprune.tune.drift import cosine

    return [float(cosine(last_state(model, c), memory.reference(model, c))) for c in calls]


def test_the_last_choice_is_made_on_fresh_samples(model: Any, calls: list[Any], memory: Memory) -> None:
    fresh = [tiny.inputs(model, ROWS, seed=seed) for seed in range(20, 29)]
    plain, found = run(model, calls, memory, trials=12), run(model, calls, memory, trials=12, fresh=fresh)
    assert [one.arguments for one in plain.tried] == [one.arguments for one in found.tried]
    finalists = sorted((t for t in found.tried if len(t.drift) == 6), key=lambda t: t.value)[:5]
    both = [measure(model, calls + fresh, one.arguments, memory).mean() for one in finalists]
    assert found.front == [finalists[int(np.argmin(both))]]
    measured = found.profiles[0].measured
    assert measured is not None
    assert measured.drift == pytest.approx(measure(model, fresh, found.front[0].arguments, memory).mean())
    assert found.passes == plain.passes + 9 * (len(finalists) + 1)


def test_defaults_come_first_and_are_never_beaten_by_worse(
    model: Any, calls: list[Any], memory: Memory
) -> None:
    found = run(model, calls, memory, methods=None, trials=8)
    first = [one.arguments["method"] for one in found.tried[:7]]
    named = ["entropyprune", "fastv", "question", "relevance", "uniform", "vflowopt", "vflowopt"]
    assert sorted(first) == named  # the default of stages is VFlowOpt's
    assert found.front[0].value <= min(one.value for one in found.tried[:7])


def test_what_is_worse_is_stopped_and_never_called_the_best(
    model: Any, calls: list[Any], memory: Memory
) -> None:
    more = [tiny.inputs(model, ROWS, seed=seed) for seed in range(6, 24)]
    found = run(model, calls + more, memory, methods=None, trials=24, batch_size=4)
    stopped = [one for one in found.tried if len(one.drift) < 24]
    assert stopped and all(one.value >= found.front[0].value for one in stopped)
    whole = run(model, calls + more, memory, methods=None, trials=24, batch_size=4, stop_early=False)
    assert all(len(one.drift) == 24 for one in whole.tried) and whole.passes > found.passes


def test_an_interrupt_while_a_trial_is_written_is_one(
    model: Any, calls: list[Any], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(**_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("optuna.study._optimize._tell_with_warning", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, calls, memory)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsga2", "random"])
def test_a_seed_repeats_its_trials(model: Any, calls: list[Any], memory: Memory, sampler: str) -> None:
    trials = 8 if sampler == "gp" else 14
    runs = [
        [one.arguments for one in run(model, calls, memory, sampler=sampler, seed=seed, trials=trials).tried]
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({str(arguments) for arguments in runs[0]}) == trials


def test_drift_against_cost_has_a_front(model: Any, calls: list[Any], memory: Memory) -> None:
    for cost, sampler in (("flops", "nsga2"), ("latency", "tpe")):
        found = run(model, calls, memory, keep=(0.2, 0.8), cost=cost, sampler=sampler, trials=10)
        points = [(one.value, one.cost) for one in found.front]
        assert points == sorted(points) and len(found.profiles) == len(points) >= 1
        every = [(one.value, one.cost) for one in found.tried]
        assert not any(a <= v and b <= c and (a, b) != (v, c) for v, c in points for a, b in every)
        assert all(isinstance(p, Profile) and 0.2 <= p.keep <= 0.8 for p in found.profiles)


def test_what_is_served_is_searched(model: Any, calls: list[Any], memory: Memory) -> None:
    """One cut, before the LLM, without biases, by methods that vLLM serves."""
    from tokenprune.serving.vllm.settings import read_settings

    found = run(model, calls, memory, served=True, methods=None, trials=8)
    assert {t.arguments["method"] for t in found.tried} <= {"vflowopt", "uniform"}
    for tried in found.tried:
        assert tried.arguments["layer"] == 0 and not tried.arguments.get("size_term", False)
    (profile,) = found.profiles
    assert [cut.layer for cut in profile.cuts] == [0]
    assert read_settings({"method": profile.method, "keep": profile.keep, **profile.parameters})


def test_a_finite_space_ends(model: Any, calls: list[Any], memory: Memory) -> None:
    found = run(model, calls, memory, methods=["fastv"], trials=100)
    layers = [one.arguments["layer"] for one in found.tried]
    assert len(layers) == len(set(layers)) < 7


def test_what_cannot_be_is_refused_before_anything_runs(model: Any, calls: list[Any], memory: Memory) -> None:
    for more, message in (
        ({"metric": "l3"}, "unknown drift"),
        ({"sampler": "grid"}, "unknown sampler 'grid'; choose one of tpe"),
        ({"sampler": "cmaes", "cost": "flops", "keep": (0.2, 0.5)}, "takes one objective"),
        ({"cost": "flops"}, "go together"),
        ({"keep": (0.5, 0.2), "cost": "flops"}, "the lower first"),
        ({"trials": 0}, "at least 1"),
        ({"methods": ["fastvv"]}, "unknown method 'fastvv'"),
        ({"methods": ["random"]}, "'random' has nothing to search"),
        ({"storage": "nowhere://x"}, "cannot open the storage"),
        ({"storage": "postgresql://u@localhost/x"}, "cannot open the storage"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(model, calls, memory, **more)
    with pytest.raises(ConfigError, match="no samples"):
        run(model, [], memory)
    with pytest.raises(ConfigError, match="nothing here can meet the budget"):
        run(model, calls, memory, methods=["fastv"], keep=0.05)
    assert not tokenprune.is_wrapped(model)


def test_an_interrupt_leaves_the_model_as_it_was(model: Any, calls: list[Any], memory: Memory) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, calls, memory, told=interrupt)
    assert not tokenprune.is_wrapped(model)


def test_the_report_shows_what_was_found(
    model: Any, calls: list[Any], memory: Memory, tmp_path: Path
) -> None:
    from tokenprune.tune.report import write_report

    for name, more in (
        ("one", {"trials": 12}),
        ("front", {"keep": (0.2, 0.8), "cost": "flops"}),
        ("few", {"trials": 1}),
    ):
        found = run(model, calls, memory, **more)
        page = write_report(found, tmp_path / name)
        text = page.read_text()
        assert f"{found.front[0].drift.mean():.4g}" in text and "random" in text and "report.png" in text
        assert (tmp_path / name / "report.png").stat().st_size > 10_000
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report(found, tmp_path / "file")


# -- storages ----------------------------------------------------------------------------------------------------------


def storages(folder: Path) -> dict[str, str]:
    return {
        "sqlite": f"sqlite:///{folder / 'deep' / 'study.db'}",
        "journal": f"journal:{folder / 'study.log'}",
    }


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_study_is_gone_on_with(
    model: Any, calls: list[Any], memory: Memory, tmp_path: Path, kind: str
) -> None:
    more = {"storage": storages(tmp_path)[kind], "study": STUDY}
    first = run(model, calls, memory, trials=5, **more)
    assert [one.arguments for one in first.tried] == [
        one.arguments for one in run(model, calls, memory, trials=5).tried
    ]
    with pytest.raises(ConfigError, match="there is a study 'shared' already"):
        run(model, calls, memory, **more)
    for wrong, message in (({"metric": "kl"}, "another metric"), ({"keep": 0.5}, "another keep, methods;")):
        with pytest.raises(ConfigError, match=message):
            run(model, calls, memory, resume=True, **wrong, **more)
    with pytest.raises(ConfigError, match="another data"):
        run(model, [*calls[1:], calls[0]], memory, resume=True, **more)
    second = run(model, calls, memory, trials=12, resume=True, **more)
    numbers = [one.number for one in second.tried]
    assert len(numbers) == 12 and numbers == sorted(set(numbers))
    assert [one.arguments for one in second.tried[:5]] == [one.arguments for one in first.tried]
    assert len({str(one.arguments) for one in second.tried}) == 12
    done = run(model, calls, memory, trials=12, resume=True, **more)
    assert [one.value for one in done.tried] == [one.value for one in second.tried]


@pytest.mark.slow
def test_a_trial_without_a_sign_of_life_fails(
    model: Any, calls: list[Any], memory: Memory, tmp_path: Path
) -> None:
    more = {"storage": storages(tmp_path)["sqlite"], "study": STUDY, "heartbeat": 1}
    study = run(model, calls, memory, trials=2, **more).study
    lost = study.ask()
    study._storage.record_heartbeat(lost._trial_id)
    time.sleep(6)  # four heartbeats, and what a database rounds
    found = run(model, calls, memory, trials=3, resume=True, **more)
    assert found.study.get_trials()[lost.number].state == STATES.FAIL
    assert [one.number for one in found.tried] == [0, 1, 3]


def test_the_cache_is_the_default_of_the_command_line(
    model: Any, calls: list[Any], memory: Memory, cache: Path
) -> None:
    found = run(model, calls, memory, trials=2, storage="cache")
    assert [path.stem for path in (cache / "studies").iterdir()] == [found.study.study_name]


def start(storage: str, trials: int, worker: int, seed: int = 0) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, str(WORKER), storage, str(trials), str(seed), str(worker)]
    root = WORKER.parents[1]
    paths = [str(root / part) for part in ("tests", ".", "kernels")]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def finished(storage: str) -> list[Any]:
    from tokenprune.tune.studies import open_storage

    study = optuna.load_study(study_name=STUDY, storage=open_storage(storage, 1))
    return [t for t in study.get_trials() if t.state == STATES.COMPLETE]


def count(storage: str) -> int:
    """Finished trials, without optuna's own look at the database, which takes as long as a trial."""
    try:
        with sqlite3.connect(storage.removeprefix("sqlite:///")) as database:
            return database.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
    except sqlite3.OperationalError:
        return 0  # not made yet


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workers"), [("sqlite", (0, 1)), ("journal", (0, 1)), ("sqlite", (0, 0))])
def test_workers_share_a_study(tmp_path: Path, kind: str, workers: tuple[int, int]) -> None:
    storage = storages(tmp_path)[kind]
    running = [start(storage, 12, worker) for worker in workers]
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()
    trials = finished(storage)
    assert 12 <= len(trials) <= 13  # each may finish one more
    assert len({str(t.params) for t in trials}) == len(trials)


@pytest.mark.slow
def test_a_killed_study_loses_the_running_trial_at_most(tmp_path: Path) -> None:
    storage, rng = storages(tmp_path)["sqlite"], random.Random(0)
    before: list[Any] = []
    for _ in range(2):
        process = start(storage, 1000, 0)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and count(storage) <= len(before) + 2:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        after = finished(storage)
        assert [t.params for t in after[: len(before)]] == [t.params for t in before]
        assert all(len(t.user_attrs["tried"]["drift"]) for t in after)
        before = after
    process = start(storage, len(before) + 5, 0)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    trials = finished(storage)
    assert len(trials) == len(before) + 5 and len({str(t.params) for t in trials}) == len(trials)


def test_passes_end_a_search(model: Any, calls: list[Any], memory: Memory) -> None:
    whole = run(model, calls, memory, fresh=calls[:2], trials=8)
    limit = whole.passes - 7
    found = run(model, calls, memory, fresh=calls[:2], trials=8, passes=limit)
    before = found.passes - len(found.tried[-1].drift)
    assert before < limit <= found.passes
    assert [one.arguments for one in found.tried] == [
        one.arguments for one in whole.tried[: len(found.tried)]
    ]
    with pytest.raises(ConfigError, match="at least 1"):
        run(model, calls, memory, passes=0)


# -- storages that are not as they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/tmp/evil", "../../evil", "..", "a b", "what?", "100%20", "é#"])
@pytest.mark.parametrize("folder", ["cache", "what?", "a%20b"])
def test_a_study_stays_in_the_cache_folder(
    folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / folder))
    file = Path(make_url(cached_storage(name)).database or "")
    assert file.parent == tmp_path / folder / "studies" and ".." not in file.name


def test_no_password_is_shown() -> None:
    for url in ("postgresql://me:SECRET@127.0.0.1:1/x", "nosuch://me:SECRET@host/x"):
        with pytest.raises(ConfigError, match="cannot open the storage") as caught:
            open_storage(url, 30)
        assert "SECRET" not in str(caught.value)


def test_a_damaged_study_is_named(model: Any, calls: list[Any], memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    run(model, calls, memory, trials=1, storage=f"sqlite:///{path}", study="a")
    whole, seed = path.read_bytes(), random.Random(1)
    for page in range(4096, len(whole) - 4096, 8192):
        path.write_bytes(whole[:page] + seed.randbytes(4096) + whole[page + 4096 :])
        with suppress(ConfigError):  # a page that is not read may be damaged
            run(model, calls, memory, trials=1, storage=f"sqlite:///{path}", study="a", resume=True)
    path.write_bytes(whole[:100] + b"x" * 5000)
    with pytest.raises(ConfigError, match=r"storage .*study\.db"):
        run(model, calls, memory, trials=1, storage=f"sqlite:///{path}", study="a", resume=True)


@pytest.mark.parametrize(
    "content", ['{"other": "json"}\n', "[1]\n", "3\n", '{"op_code": 99, "worker_id": "x"}\n']
)
def test_a_journal_of_other_json_is_named(
    content: str, model: Any, calls: list[Any], memory: Memory, tmp_path: Path
) -> None:
    (tmp_path / "journal").write_text(content)
    with pytest.raises(ConfigError, match="journal"):
        run(model, calls, memory, trials=1, storage=f"journal:{tmp_path / 'journal'}", study="a")
