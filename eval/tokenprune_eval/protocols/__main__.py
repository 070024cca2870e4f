"""``python -m tokenprune_eval.protocols``: list, show, run and check published tables."""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenprune.errors import TokenPruneError
from tokenprune_eval.checkpoints import write_llava
from tokenprune_eval.lmms.run import run_lmms_eval
from tokenprune_eval.protocols.dry import dry_names, write_dry_tasks
from tokenprune_eval.protocols.table import Table, load_table, table_names
from tokenprune_eval.protocols.verdict import verdict


def main(argv: Sequence[str] | None = None) -> None:
    """List, show, run or check."""
    parser = argparse.ArgumentParser(
        prog="tokenprune_eval.protocols", description="Published tables, reproduced."
    )
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("list", help="the tables there are")
    for name, text in {
        "show": "what a table's numbers mean, and the commands that reproduce it",
        "run": "run what is not there yet, with lmms-eval; needs a GPU and the hub unless --dry-run",
        "check": "compare the results with the published numbers",
    }.items():
        own = what.add_parser(name, help=text)
        own.add_argument("table", choices=table_names())
        own.add_argument("--out", type=Path, help="results (default: protocols/TABLE)")
        own.add_argument("--pretrained", help="another checkpoint of the same model")
        if name == "run":
            own.add_argument("--runs", nargs="+", help="only these (see show)")
            own.add_argument("--limit", type=int, help="documents per task")
            own.add_argument(
                "--dry-run", action="store_true", help="a tiny local checkpoint and made-up documents"
            )
    options = parser.parse_args(argv)
    if options.what == "list":
        for name in table_names():
            print(f"{name:<32}{load_table(name).title}")
        return
    table = load_table(options.table)
    out = options.out or Path("protocols") / options.table
    try:
        if options.what == "show":
            show(table, options.table, options.pretrained)
        elif options.what == "run" and options.dry_run:
            dry_run(table, out)
        elif options.what == "run":
            run(table, out, options.pretrained, options.runs, options.limit)
        else:
            print("\n".join(map(str, verdict(table, out))))
    except TokenPruneError as error:
        raise SystemExit(f"error: {error}") from None


def show(table: Table, name: str, pretrained: str | None) -> None:
    """Words and commands."""
    print(f"{table.title}\n\nSource: {table.source}\nBudget: {table.budget}\nMetric: {table.metric}\n")
    for run_name, args in table.runs().items():
        words = [
            "python",
            "-m",
            "lmms_eval",
            "--model",
            "tokenprune",
            "--model_args",
            _args(table, args, pretrained),
        ]
        words += [
            "--tasks",
            ",".join(task.name for task in table.tasks),
            "--batch_size",
            str(table.batch_size),
        ]
        words += ["--output_path", f"protocols/{name}/{run_name}"]
        print(shlex.join(words))
    print(f"python -m tokenprune_eval.protocols check {name}")
    for method, numbers in table.elsewhere.items():
        shown = ", ".join(
            f"{budget}: {number}" for budget, number in zip(table.budgets, numbers, strict=True)
        )
        print(f"published, not offered here: {method} ({shown})")


def run(
    table: Table, out: Path, pretrained: str | None, only: Sequence[str] | None, limit: int | None
) -> None:
    """Every run that has no results yet."""
    tasks = ",".join(task.name for task in table.tasks)
    more = () if limit is None else ("--limit", str(limit))
    for name, args in table.runs().items():
        if (only and name not in only) or any((out / name).rglob("*_results.json")):
            continue
        print(name, flush=True)
        given = _args(table, args, pretrained)
        run_lmms_eval(given, tasks, out / name, *more, batch_size=table.batch_size)
    print("\n".join(map(str, verdict(table, out))))


def dry_run(table: Table, out: Path) -> None:
    """The same runs on a checkpoint of random weights in LLaVA-1.5's layout, with made-up documents, on the CPU.

    Layers, tokens and files are the real ones (but for OneVision's and Qwen's, whose place LLaVA-1.5's takes); the
    scores mean nothing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = write_llava(Path(scratch) / "model")
        folder = write_dry_tasks(table, Path(scratch) / "tasks")
        names = dry_names(table)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        for name, args in table.runs().items():
            given = f"pretrained={checkpoint},dtype=float32,{args}"
            include = ("--include_path", str(folder), "--device", "cpu")
            run_lmms_eval(given, ",".join(names.values()), out / name, *include)
            print(f"{name}: ran", flush=True)
        print("\n".join(map(str, verdict(table, out, names))))


def _args(table: Table, args: str, pretrained: str | None) -> str:
    return f"pretrained={pretrained or table.model},dtype={table.dtype},{args}"


if __name__ == "__main__":
    main()
