"""What somebody meets first: versions, hints, progress on a pipe, Ctrl-C, profiles that are listed and not lost."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
import tokenprune
from tokenprune import Profile
from tokenprune.cli import app, shell
from tokenprune.compare.summary import Share
from tokenprune.fingerprint import fingerprint
from tokenprune.profiles.known import WorseProfileError, known_profile, list_profiles, remember_profile
from tokenprune.profiles.profile import Made, Measured
from tokenprune.tune.search import search

ROOT = Path(__file__).resolve().parents[1]


def call(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def started(*args: object, **environment: str) -> subprocess.Popen[str]:
    paths = [str(ROOT / part) for part in (".", "kernels", "eval")]
    added = {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "tokenprune", *map(str, args)],
        env=os.environ | added,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_module_is_the_program() -> None:
    running = started("--version")
    said, _ = running.communicate(timeout=120)
    assert (running.returncode, said) == (0, f"tokenprune {tokenprune.__version__}\n")
    assert "--install-completion" in call("--help").stdout


def test_what_is_decided_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.llava()
    with (
        caplog.at_level(logging.INFO, logger="tokenprune"),
        tokenprune.pruned(model, "uniform", keep=0.5, layer=2),
    ):
        pass
    assert "wrapped a llava model: uniform, cuts at layers 2" in caplog.text and "unwrapped" in caplog.text


# -- long work ----------------------------------------------------------------------------------------------------


def test_a_pipe_is_told_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 3.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr(shell.time, "monotonic", lambda: next(clock))
    with shell.progress("reading", quiet=False) as show:
        for done in range(1, 5):
            show("prompts", done, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading ..." and lines[1] == "prompts: 2 of 4 after 12 s, about 12 s left"
    assert lines[2:] == ["prompts: 4 of 4 after 14 s"]
    with shell.progress("reading", quiet=True) as show:
        show("prompts", 1, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "tune"])
def test_after_ctrl_c_what_is_kept_is_said_and_gone_on_with(command: str, tmp_path: Path) -> None:
    cache = {"TOKENPRUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    asked: list[object] = [command, "small", "--data", "testbed", "--method", "vflowopt", "--budget", "25%"]
    if command == "compare":
        asked += ["--questions", 400, "--batch-size", 4, "--time-batch", 0, "--out", tmp_path / "out"]
    else:
        asked += ["--samples", 8, "--trials", 4000, "--storage", f"sqlite:///{tmp_path}/study.db"]
    running = started(*asked, **cache)
    assert running.stderr is not None
    files = {"compare": tmp_path / "out", "tune": tmp_path / "study.db"}
    deadline = time.monotonic() + 120
    while not files[command].exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.2)
    time.sleep(6)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130, told
    last = told.strip().splitlines()[-1]
    assert last.startswith("interrupted: all") and "--resume goes on" in last and "Traceback" not in told
    if command == "tune":
        return
    rows = sum(1 for path in (tmp_path / "out").rglob("*.jsonl") for _ in path.open())
    assert rows > 4, "answers are kept"


@pytest.mark.slow
def test_two_workers_started_together_both_work(tmp_path: Path) -> None:
    asked = ["tune", "small", "--data", "testbed", "--budget", "25%", "--method", "vflowopt", "--samples", 6]
    asked += ["--trials", 6, "--storage", f"sqlite:///{tmp_path}/shared.db"]
    environment = {"TOKENPRUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    running = [started(*asked, "--worker", n, "--json", **environment) for n in (0, 1)]
    found = []
    for process in running:
        said, told = process.communicate(timeout=250)
        assert process.returncode == 0, told
        found.append(json.loads(said))
    assert found[0]["study"] == found[1]["study"] and len(found[1]["trials"]) >= 6


# -- what a search says -------------------------------------------------------------------------------------------


def test_few_trials_and_samples_are_cautioned_and_the_worst_named(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from tokenprune.tune.report import write_report

    model = tiny.llava()
    calls = [tiny.inputs(model, [["text:3", "image", "text:4"]], seed=i) for i in range(9)]
    found = search(model, calls[:6], 0.4, fresh=calls[6:], methods=["vflowopt"], trials=3)
    assert [text.split()[0] for text in found.cautions()] == ["3", "6"]
    assert set(found.held_out) == {"found", *found.controls} and len(found.held_out["found"]) == 3
    names = ["holiday|1.jpg", *(f"{i}.jpg" for i in range(1, 6))]
    page = write_report(found, tmp_path, names).read_text()
    assert "**Caution.** 3 trials are few" in page and "| found, held out |" in page
    worst = int(np.argmax(found.front[0].drift))
    assert f"| `{names[worst].replace('|', '?')}` |" in page


def test_no_share_has_an_interval_without_width() -> None:
    for right in (np.zeros(8, bool), np.ones(8, bool)):
        share = Share.of(right, [str(i // 2) for i in range(8)])
        assert share is not None and share.high - share.low == pytest.approx(
            0.49, abs=0.01
        )  # of four pictures


# -- profiles -----------------------------------------------------------------------------------------------------


def made(model: Any, drift: float, keep: float = 0.3, data: str = "d", **more: Any) -> Profile:
    measured = Measured(drift=drift, controls={"random": 0.9})
    own = {
        "method": "uniform",
        "keep": keep,
        "model": fingerprint(model),
        "family": "llava",
        "name": "me/model",
    }
    return Profile(
        **{**own, "made": Made(data=data, date="2026-01-01"), "measured": measured, **more}
    ).sealed()


def test_a_worse_profile_never_takes_the_place_of_a_better_one(cache: Path) -> None:
    model = tiny.llava()
    better = made(model, 0.1)
    remember_profile(better)
    with pytest.raises(WorseProfileError, match=f"profiles rm {better.hash[:8]}"):
        remember_profile(made(model, 0.2))
    assert known_profile(fingerprint(model), 0.3) == better
    other = made(model, 0.2, data="others")  # nobody can tell: the newer is taken
    remember_profile(other)
    remember_profile(made(model, 0.1, data="others"))
    assert known_profile(fingerprint(model), 0.3).measured.drift == 0.1


def test_profiles_are_listed_shown_and_removed(cache: Path, tmp_path: Path) -> None:
    profile = made(tiny.llava(), 0.1)
    remember_profile(profile)
    listed = call("profiles", "list", "--json")
    facts = [one for one in json.loads(listed.stdout) if not one["bundled"]]
    assert [one["hash"] for one in facts] == [profile.hash[:8]] and facts[0]["model"] == "me/model"
    assert any(one["bundled"] for one in json.loads(listed.stdout))
    assert "me/model" in call("profiles", "list").stdout
    shown = call("profiles", "show", profile.hash[:6])
    assert Profile.model_validate_json(shown.stdout) == profile
    path = profile.save(tmp_path / "own.json")
    assert Profile.model_validate_json(call("profiles", "show", path).stdout) == profile
    bundled = next(one.profile.hash for one in list_profiles() if one.bundled)
    for words, text in (
        (("show", "nosuch"), "no profile has a hash"),
        (("rm", "ab"), "a hash that begins with 'ab'"),
        (("rm", bundled), "came with the package"),
        (("show", tmp_path / "nosuch.json"), "cannot read"),
    ):
        refused = call("profiles", *words)
        assert refused.exit_code == 2 and text in refused.stderr, refused.stderr
    assert call("profiles", "rm", profile.hash[:8]).exit_code == 0
    assert all(one.bundled for one in list_profiles())
