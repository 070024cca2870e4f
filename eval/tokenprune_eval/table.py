"""Accuracy of pruning methods on the testbed: ``python -m tokenprune_eval.table``.

Rows: `none`; `random` with several seeds; `uniform`; `entropyprune` with both normalisations and four sources; each
at every average retention and layer. Columns: accuracy overall and per question family with 95 % Wilson intervals,
KV bytes, FLOPs, prefill time. A budget a layer cannot reach makes a row that says so.

Rows are appended as they are done; after a kill `--resume` goes on. Prefill is timed at the end, when nothing else
runs, and filled in. ``--summary`` prints the files as Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tokenprune
from tokenprune import machine
from tokenprune.analysis.memory import Memory
from tokenprune.budget import average_floor
from tokenprune.timing import Arm, interleave, milliseconds, ratio
from tokenprune_eval.cached import CachedProcessor
from tokenprune_eval.cells import METHODS, NORMALIZATIONS, SOURCES, Cell, grid
from tokenprune_eval.results import Results
from tokenprune_eval.summary import compact, summarise
from tokenprune_testbed import FAMILIES, evaluate, evaluation_set, load
from tokenprune_testbed.language import make_inputs
from tokenprune_testbed.scenes import DEFAULT_SCENES, SCENE_KINDS, SceneKind

QUESTION_SEED = 0
COLUMNS = [
    *("key", "method", "parameters", "layer", "keep", "status", "floor", "kept", "retention_average"),
    *("retention_after_cut", "questions", "correct", "accuracy", "low", "high"),
    *(f"{family} {what}" for family in FAMILIES for what in ("questions", "accuracy", "low", "high")),
    *(
        "kv_bytes_per_prompt",
        "flops_ratio",
        "prefill_ms",
        "prefill_none_ms",
        "prefill_ratio",
        "prefill_ratio p20",
    ),
    *("prefill_ratio p80", "seconds", "model", "scenes", "question_seed", *machine.FIELDS),
]
TIMED = [name for name in COLUMNS if name.startswith("prefill")]


class Testbed:
    """A model, its processor and the questions, in one process.

    Args:
        name: of `tokenprune_testbed.load`, or "random": the small model without training.
        scenes: that questions are asked about.
        questions: how many.
        batch_size: prompts per batch.
    """

    __test__ = False  # not for pytest

    def __init__(self, name: str, scenes: SceneKind, questions: int, batch_size: int) -> None:
        self.model, processor = _load(name)
        self.processor = CachedProcessor(processor)
        self.memory = Memory()
        self.scenes, self.samples = scenes, evaluation_set(questions, seed=QUESTION_SEED, scenes=scenes)
        self.batch_size = batch_size
        self.digest = _digest(self.model)

    def evaluate(self, cell: Cell) -> tuple[dict[str, str], list[bool] | None]:
        """One row, without the prefill times, and the per-question outcomes (None when the budget is unreachable)."""
        row = dict.fromkeys(COLUMNS, "")
        row |= {
            "key": cell.key,
            "method": cell.method,
            "parameters": " ".join(f"{name}={value}" for name, value in cell.parameters),
            "layer": "" if cell.layer is None else str(cell.layer),
            "keep": "" if cell.keep is None else str(cell.keep),
            "status": "ok",
            "questions": str(len(self.samples)),
            "model": self.digest,
            "scenes": self.scenes,
            "question_seed": str(QUESTION_SEED),
            **machine.describe(),
        }
        if cell.layer is not None:
            layers = self.model.config.text_config.num_hidden_layers
            row["floor"] = f"{average_floor(cell.layer, layers, self.model.config.image_seq_length):.4f}"
        kv, flops, unpruned = 0, 0, 0
        reports: list[tokenprune.Report] = []

        def read(indices: list[int]) -> None:
            nonlocal kv, flops, unpruned
            report = tokenprune.report(self.model)
            reports[:] = [report]
            kv, flops, unpruned = kv + report.kv_used, flops + report.flops, unpruned + report.flops_unpruned

        try:
            with tokenprune.pruned(self.model, **cell.arguments()), self.memory.features(self.model):
                result = evaluate(
                    self.model, self.processor, self.samples, self.batch_size, after_generate=read
                )
        except tokenprune.BudgetError:
            return {**row, "status": "unreachable"}, None
        row |= {
            "kept": str(
                reports[0].images[0].kept[-1] if cell.layer is not None else reports[0].images[0].tokens
            ),
            "retention_average": f"{reports[0].retention_average:.4f}",
            "retention_after_cut": f"{reports[0].retention_after_cut:.4f}",
            "correct": str(result.overall.correct),
            "kv_bytes_per_prompt": f"{kv / len(self.samples):.0f}",
            "flops_ratio": f"{flops / unpruned:.4f}",
            "seconds": f"{result.seconds:.1f}",
        }
        for prefix, score in {"": result.overall, **{f"{f} ": s for f, s in result.families.items()}}.items():
            row |= {
                f"{prefix}questions": str(score.total),
                f"{prefix}accuracy": f"{score.accuracy:.4f}",
                f"{prefix}low": f"{score.low:.4f}",
                f"{prefix}high": f"{score.high:.4f}",
            }
        return row, result.correct

    def time(self, cells: Sequence[Cell], rounds: int, prompts: int = 8) -> dict[str, dict[str, str]]:
        """Prefill times of cells, paired with the unwrapped model's on the same prompts, vision tower included."""
        picked = [s for s in self.samples if len(s.images) == 1]
        words = len(picked[0].question.split())
        picked = [s for s in picked if len(s.question.split()) == words][:prompts]
        inputs = make_inputs(self.processor, picked)

        def prefill(state: object) -> object:
            return self.model(**inputs, use_cache=True, logits_to_keep=1)

        arms = {"": Arm(prefill)} | {
            cell.key: Arm(prefill, context=partial(tokenprune.pruned, self.model, **cell.arguments()))
            for cell in cells
        }
        seconds = interleave(arms, rounds, warmup=1)
        none = seconds.pop("")
        times = {}
        for key, taken in seconds.items():
            share = ratio(taken, none)
            values = [milliseconds(taken), milliseconds(none), share.median, share.p20, share.p80]
            times[key] = {name: f"{value:.4g}" for name, value in zip(TIMED, values, strict=True)}
        return times


def _load(name: str) -> tuple[Any, Any]:
    if name == "random":
        from tokenprune_testbed.modeling import build_model, build_processor

        torch.manual_seed(0)
        return build_model().eval(), build_processor()
    return load(name)


def _digest(model: torch.nn.Module) -> str:
    """Of the weights, so that rows of two models never meet in one table."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


_testbed: Testbed | None = None  # one per worker process


def _start_worker(name: str, scenes: SceneKind, questions: int, batch_size: int, threads: int) -> None:
    global _testbed
    torch.set_num_threads(threads)
    _testbed = Testbed(name, scenes, questions, batch_size)


def _work(cell: Cell) -> tuple[dict[str, str], list[bool] | None]:
    assert _testbed is not None
    return _testbed.evaluate(cell)


def rows(
    cells: Sequence[Cell], name: str, scenes: SceneKind, questions: int, batch_size: int, workers: int
) -> Iterator[tuple[dict[str, str], list[bool] | None]]:
    """Rows of cells as they are done, in any order when there are several workers."""
    threads = max(1, torch.get_num_threads() // workers)
    given = (name, scenes, questions, batch_size, threads)
    if workers == 1:
        _start_worker(*given)
        yield from map(_work, cells)
        return
    # Fresh interpreters: a fork of a process that has used torch's thread pool can hang.
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, given) as pool:
        yield from pool.imap_unordered(_work, cells)


def fill_times(results: Results, testbed: Testbed, cells: Sequence[Cell], rounds: int) -> None:
    """Time what has no prefill time yet, one layer and budget at a time; seeds of `random` share one time."""
    groups: dict[tuple[int | None, float | None], dict[str, list[Cell]]] = {}
    for cell in cells:
        row = results.rows.get(cell.key)
        if row is not None and row["status"] == "ok" and not row["prefill_ms"]:
            groups.setdefault((cell.layer, cell.keep), {}).setdefault(cell.label, []).append(cell)
    for group in groups.values():
        times = testbed.time([same[0] for same in group.values()], rounds)
        for same in group.values():
            for cell in same:
                results.rows[cell.key] |= times[same[0].key]
        results.write(cell.key for cell in cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the table, go on with it, or print it."""
    parser = argparse.ArgumentParser(description="Accuracy of pruning methods on the testbed.")
    parser.add_argument(
        "--questions", type=int, default=2000, help="divisible by 10 gives equal families (default: 2000)"
    )
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.5, 0.33, 0.22, 0.11], help="average retentions"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="decoder layers the cut enters")
    parser.add_argument("--seeds", type=int, default=5, help="of random (default: 5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES, help="of entropyprune")
    parser.add_argument(
        "--normalizations", nargs="+", choices=NORMALIZATIONS, default=NORMALIZATIONS, help="of entropyprune"
    )
    parser.add_argument(
        "--model",
        default="small",
        help="small (default), smol, random (not trained), a folder, an adapter's file",
    )
    parser.add_argument("--scenes", choices=SCENE_KINDS, default=DEFAULT_SCENES)
    parser.add_argument("--csv", type=Path, help="(default: eval/results/table_MODEL.csv)")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)"
    )
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument(
        "--rounds", type=int, default=9, help="of paired prefills; 0 leaves the times empty (default: 9)"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the CSV already")
    parser.add_argument("--summary", action="store_true", help="only print the CSV as Markdown")
    parser.add_argument(
        "--compact", action="store_true", help="only print one table of accuracies, as in README"
    )
    options = parser.parse_args(argv)
    results = Results(options.csv or Path(f"eval/results/table_{options.model}.csv"), COLUMNS)
    if options.summary or options.compact:
        results.load()
        print(compact(results, options.layers) if options.compact else summarise(results, options.layers))
        return

    cells = grid(
        options.budgets,
        options.layers,
        options.seeds,
        options.methods,
        options.sources,
        options.normalizations,
    )
    testbed = Testbed(options.model, options.scenes, options.questions, options.batch_size)
    if options.resume:
        results.load()
    _check_same(results, testbed)
    results.write()  # starts a new table, or drops a line that was cut short
    open_cells = [cell for cell in cells if cell.key not in results.rows]
    print(f"{len(open_cells)} of {len(cells)} rows to do, {len(testbed.samples)} questions each", flush=True)
    started = time.perf_counter()
    for done, (row, correct) in enumerate(
        rows(
            open_cells,
            options.model,
            options.scenes,
            options.questions,
            options.batch_size,
            options.workers,
        ),
        start=1,
    ):
        results.add(row, correct)
        accuracy = (
            f"{float(row['accuracy']):.1%}"
            if row["accuracy"]
            else f"unreachable (floor {float(row['floor']):.1%})"
        )
        elapsed = time.perf_counter() - started
        print(f"[{done}/{len(open_cells)}, {elapsed / 60:.1f} min] {row['key']}: {accuracy}", flush=True)
    results.write(cell.key for cell in cells)
    if options.rounds:
        fill_times(results, testbed, cells, options.rounds)
    print(summarise(results, options.layers))


def _check_same(results: Results, testbed: Testbed) -> None:
    """Rows kept by --resume must be answers of the same model to the same questions.

    Raises:
        SystemExit: they are not.
    """
    expected = {
        "model": testbed.digest,
        "scenes": testbed.scenes,
        "questions": str(len(testbed.samples)),
        "question_seed": str(QUESTION_SEED),
    }
    for row in results.rows.values():
        for name, value in expected.items():
            if row[name] != value:
                raise SystemExit(
                    f"{results.path} holds rows with {name} {row[name]}, not {value}; start anew without --resume"
                )


if __name__ == "__main__":
    main()
