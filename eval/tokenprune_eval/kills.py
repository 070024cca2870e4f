"""What SIGKILL does to a study: ``python -m tokenprune_eval.kills``.

For every seed a study of the small testbed in an SQLite file is killed again and again at random moments and resumed
each time, until it has its trials; beside it the same study in one go. Every finished trial must be there once, no
parameters twice, and the best of the killed studies among those of the others.
"""

from __future__ import annotations

import argparse
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch

from tokenprune import machine
from tokenprune.tune.search import search
from tokenprune.tune.studies import open_storage
from tokenprune_eval.results import Results
from tokenprune_testbed import load

STUDY, KEEP, SAMPLES = "kills", 0.22, 12
COLUMNS = [
    "key",
    "seed",
    "arm",
    "kills",
    "finished",
    "distinct",
    "lost",
    "best_drift",
    "seconds",
    *machine.FIELDS,
]


def work(url: str, trials: int, seed: int) -> None:
    """One life of a study."""
    from tokenprune.analysis.calibration import calibration_calls, load_calibration

    torch.set_num_threads(1)
    model, processor = load("small")
    calls = list(calibration_calls(processor, load_calibration("testbed", SAMPLES)))
    search(
        model,
        calls,
        KEEP,
        methods=["vflowopt"],
        trials=trials,
        seed=seed,
        storage=url,
        study=STUDY,
        resume=True,
        heartbeat=1,
    )


def start(url: str, trials: int, seed: int) -> subprocess.Popen[bytes]:
    words = ["-m", "tokenprune_eval.kills", "--work", url, "--trials", str(trials), "--seed", str(seed)]
    return subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)


def finished(file: Path) -> int:
    """Trials that are complete, read past optuna."""
    try:
        with sqlite3.connect(file) as database:
            return int(database.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # not made yet


def run(folder: Path, trials: int, seed: int, kills: int) -> dict[str, Any]:
    """A study that is killed so many times, evenly over its trials but at random moments of them."""
    file = folder / f"{seed}-{kills}.db"
    url, rng, began = f"sqlite:///{file}", random.Random(seed), time.monotonic()
    seen: set[tuple[int, str]] = set()
    for kill in range(1, kills + 1):
        process = start(url, trials, seed)
        while process.poll() is None and finished(file) < kill * trials // (kills + 1):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {(t.number, str(t.params)) for t in _complete(url)}
        assert seen <= now, "a finished trial is gone"
        seen = now
    if start(url, trials, seed).wait():
        raise SystemExit(f"the study {file} failed")
    complete = _complete(url)
    numbers = [t.number for t in complete]
    assert len(set(numbers)) == len(numbers) and seen <= {(t.number, str(t.params)) for t in complete}
    whole = [t.value for t in complete if len(t.user_attrs["tried"]["drift"]) == SAMPLES]
    return {
        "seed": seed,
        "arm": "killed" if kills else "whole",
        "kills": kills,
        "finished": len(complete),
        "distinct": len({str(t.params) for t in complete}),
        "lost": max(numbers) + 1 - len(numbers),
        "best_drift": f"{min(whole):.6g}",
        "seconds": f"{time.monotonic() - began:.0f}",
    }


def _complete(url: str) -> list[Any]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name=STUDY, storage=open_storage(url, 1))
    return [t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]


def main(argv: Sequence[str] | None = None) -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description="Studies that are killed.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=63)
    parser.add_argument("--csv", type=Path, default=Path("eval/results/kills.csv"))
    parser.add_argument("--work", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        work(options.work, options.trials, options.seed)
        return
    results = Results(options.csv, COLUMNS)
    results.load()
    described = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for kills in (0, options.kills):
                key = f"{seed} {kills} {options.trials}"
                if key not in results.rows:
                    row = run(Path(folder), options.trials, seed, kills)
                    results.add(
                        {"key": key, **{name: str(value) for name, value in row.items()}, **described}
                    )
                print(results.rows[key], flush=True)
    rows = list(results.rows.values())
    best = {arm: [float(r["best_drift"]) for r in rows if r["arm"] == arm] for arm in ("killed", "whole")}
    print(
        f"median best of the killed: {statistics.median(best['killed']):.4g}; of the others "
        f"{min(best['whole']):.4g} to {max(best['whole']):.4g}"
    )
    assert all(row["finished"] == row["distinct"] for row in rows), "parameters were tried twice"


if __name__ == "__main__":
    main()
