"""lmms-eval itself over pruned models, checked against our own evaluator: ``python -m tokenprune_eval.lmms.run``.

lmms-eval's command exits with 0 when it fails, so that what counts here is its results file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenprune
from tokenprune.arguments import Arguments
from tokenprune.cli.loading import load_model
from tokenprune.cli.parse import parse_pairs
from tokenprune.errors import TokenPruneError
from tokenprune_eval.lmms.testbed import GROUP, task_name, write_tasks
from tokenprune_testbed import Sample, evaluate

ARMS = ("method=none", "method=auto,keep=0.25")


class FailedError(TokenPruneError):
    """lmms-eval left no results."""


def run_lmms_eval(
    model_args: str, tasks: str, out: Path, *more: str, batch_size: int = 1, timeout: float | None = None
) -> dict[str, Any]:
    """Run lmms-eval's own command, and read its results file.

    Args:
        model_args: of ``--model tokenprune``.
        tasks: names, with commas between them.
        out: folder for its results.
        *more: further words of the command.
        batch_size: prompts.
        timeout: seconds.

    Raises:
        FailedError: there is no results file; shows the end of what the command said.
    """
    words = [sys.executable, "-m", "lmms_eval", "--model", "tokenprune", "--model_args", model_args]
    words += ["--tasks", tasks, "--batch_size", str(batch_size), "--output_path", str(out), *more]
    before = set(out.rglob("*_results.json"))
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    new = sorted(set(out.rglob("*_results.json")) - before)
    if done.returncode or not new:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise FailedError(f"lmms-eval left no results ({' '.join(words[2:])}):\n{said}")
    found: dict[str, Any] = json.loads(new[-1].read_text())
    return found


def own_accuracies(
    pretrained: str, model_args: str, samples: Sequence[Sample], batch_size: int
) -> dict[str, float]:
    """What our evaluator says of the same questions, by family."""
    model, processor = load_model(pretrained, "float32", "cpu")
    arguments = Arguments.from_text(parse_pairs("METHOD", model_args.split(",")))
    with tokenprune.pruned(model, **arguments.given()):
        result = evaluate(model, processor, samples, batch_size)
    return {family: score.accuracy for family, score in result.families.items()}


def accuracy(results: Mapping[str, Any], task: str) -> float:
    """A task's accuracy in lmms-eval's results."""
    return float(results["results"][task]["accuracy,none"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run, compare, and fail where anything differs."""
    parser = argparse.ArgumentParser(description="lmms-eval over the testbed, unpruned and pruned.")
    parser.add_argument("--model", default="small")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="method=NAME,keep=SHARE")
    parser.add_argument("--out", type=Path, help="keep tasks and results there")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        out: Path = options.out or Path(scratch)
        samples = write_tasks(out / "tasks", options.questions)
        differ = [arm for arm in options.arms if not _same(options.model, arm, samples, out)]
    if differ:
        raise SystemExit(f"lmms-eval and our evaluator differ: {'; '.join(differ)}")


def _same(model: str, arm: str, samples: Sequence[Sample], out: Path) -> bool:
    model_args = f"pretrained={model},dtype=float32,{arm}"
    include = ("--include_path", str(out / "tasks"), "--device", "cpu")
    theirs = run_lmms_eval(model_args, GROUP, out / "results", *include)
    ours = own_accuracies(model, arm, samples, batch_size=1)
    print(f"\n{arm}\n{'family':<14}{'lmms-eval':>10}{'ours':>10}")
    same = True
    for family, own in ours.items():
        their = accuracy(theirs, task_name(family))
        same &= their == own
        print(f"{family:<14}{their:>10.4f}{own:>10.4f}{'' if their == own else '  DIFFERS'}")
    print(f"{'all':<14}{accuracy(theirs, GROUP):>10.4f}")
    shown = {
        name.removeprefix("avg_"): v for name, v in theirs["throughput"].items() if name.startswith("avg_")
    }
    print("  ".join(f"{name} {value:.4g}" for name, value in shown.items()), flush=True)
    return same


if __name__ == "__main__":
    main()
