"""`tokenprune compare`: methods and controls at equal budgets on somebody's questions, and a report."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.loading import load_model, scale_pictures
from tokenprune.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    MaxPixels,
    MinPixels,
    ModelArgument,
    Side,
)
from tokenprune.cli.shell import check_place, console, kept, print_json, progress, table
from tokenprune.optional import check_installed

if TYPE_CHECKING:
    from tokenprune.compare.run import Progress
    from tokenprune.compare.summary import Summary

METHODS = ("auto", "vflowopt", "entropyprune", "fastv")
BUDGETS = ("50%", "25%", "12.5%")
CONTROLS = ("uniform", "random", "random deep", "downsample")


class Match(str, Enum):
    """When an answer is right."""

    exact = "exact"
    contains = "contains"


def compare(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="A .jsonl file (image, question, answer, family), hf:OWNER/NAME:SPLIT, a folder of images, or "
            "'testbed': its held-out questions.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="For report.html, compare.csv and the rest.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME[,PARAM=VALUE]",
            help=f"Repeatable; 'all': every one. [default: {', '.join(METHODS)}]",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="25%|0.25", help=f"Repeatable. [default: {', '.join(BUDGETS)}]"),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", metavar="NAME", help=f"Repeatable. [default: {', '.join(CONTROLS)}]"),
    ] = None,
    questions: Annotated[int, typer.Option("--questions", min=1, help="How many.")] = 500,
    match: Annotated[Match, typer.Option("--match", help="When an answer is right.")] = Match.exact,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = 32,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per batch.")] = 8,
    time_batch: Annotated[
        list[int] | None,
        typer.Option("--time-batch", min=0, help="Batch sizes to time; repeatable; 0: none. [default: 1, 8]"),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of timing, every arm once in each.")] = 5,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Of the whole answer that is timed.")
    ] = 32,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the questions drawn.")] = 0,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    size: Side = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods with each other and with controls on your model and questions, and write a report."""
    options: dict[str, Any] = {
        "methods": tuple(method or METHODS),
        "budgets": _budgets(budget or BUDGETS),
        "controls": tuple(control or CONTROLS),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "match": match.value,
        "time_batches": tuple(size for size in (time_batch or (1, 8)) if size),
        "rounds": rounds,
        "new_tokens": new_tokens,
    }
    _check(options, out)
    from tokenprune.compare.export import write_csv, write_json
    from tokenprune.compare.figures import accuracy_against_retention
    from tokenprune.compare.page import write_page
    from tokenprune.compare.questions import load_questions
    from tokenprune.compare.run import compare as run

    asked = load_questions(data, questions, seed=seed)
    loaded, processor = load_model(model, dtype.value, device)
    scale_pictures(processor, min_pixels, max_pixels, size)
    going_on = f"all answers so far are kept in {out}; the same command with --resume goes on"
    with progress("unpruned", as_json) as show, kept(lambda: going_on):

        def told(now: Progress) -> None:
            show(now.what, now.done, now.total)

        found = run(loaded, processor, asked, out, resume=resume, told=told, **options)
    about = _about(model, data, loaded)
    scaled = {"min-pixels": min_pixels, "max-pixels": max_pixels, "size": size}
    command = _command(model, data, out, options, questions, seed, dtype.value, scaled)
    write_csv(found.summary, out / "compare.csv", about)
    write_json(found.summary, out / "compare.json", {**about, "command": command})
    write_page(found, out / "report.html", about, command)
    if found.summary.whole.accuracy is not None:
        (out / "accuracy.svg").write_text(accuracy_against_retention(found.summary), encoding="utf-8")
    if as_json:
        print_json({"report": str(out / "report.html"), "csv": str(out / "compare.csv"), "command": command})
    else:
        _show(found.summary, out / "report.html")


def _budgets(texts: list[str] | tuple[str, ...]) -> tuple[Any, ...]:
    from tokenprune.arguments import read_keep

    return tuple(read_keep(text) for text in texts)


def _check(options: dict[str, Any], out: Path) -> None:
    """What can be refused before a model is loaded."""
    check_installed("a comparison", "scipy", "matplotlib", "jinja2", extra="compare")
    check_place(out)
    from tokenprune.compare.run import CompareOptions

    CompareOptions(**options)


def _about(model: str, data: str, loaded: Any) -> dict[str, str]:
    from tokenprune.machine import describe
    from tokenprune.models import stock_model

    inner: Any = stock_model(loaded)
    attention = inner.config.get_text_config()._attn_implementation
    return {
        "model": model,
        "data": data,
        "dtype": str(inner.dtype).removeprefix("torch."),
        "attention": str(attention),
        **describe(),
    }


def _command(
    model: str,
    data: str,
    out: Path,
    options: dict[str, Any],
    questions: int,
    seed: int,
    dtype: str,
    scaled: dict[str, int | None],
) -> str:
    words = ["tokenprune", "compare", model, "--data", data, "--out", out.name]
    controls = () if options["controls"] == CONTROLS else options["controls"]
    given = (("--method", options["methods"]), ("--budget", options["budgets"]), ("--control", controls))
    for name, values in given:
        for value in values:
            words += [name, f"{value:g}" if isinstance(value, float) else value]
    for size in options["time_batches"] or (0,):
        words += ["--time-batch", str(size)]
    words += ["--questions", str(questions), "--seed", str(seed), "--dtype", dtype]
    for name in ("match", "max_new_tokens", "batch_size", "rounds", "new_tokens"):
        words += [f"--{name.replace('_', '-')}", str(options[name])]
    for name, value in scaled.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def _show(summary: Summary, page: Path) -> None:
    title = f"{len(summary.questions)} questions; * the interval of the paired difference excludes 0"
    minus = ("random", "uniform", "downsample")
    shown = table(
        title,
        ("", "kept", "accuracy", *(f"- {name}" for name in minus), "loyalty", "drift", "KV"),
        whole=True,
    )
    for row in summary.rows:
        if row.refused:
            shown.add_row(row.name, f"({row.keep:.1%})" if row.keep else "", "not possible", *[""] * 6)
            continue
        found = [row.against.get(name) for name in minus]
        against = ["" if d is None else f"{d.points:+.1f}{'*' if d.low * d.high > 0 else ' '}" for d in found]
        loyalty = "" if row.loyalty is None else f"{row.loyalty.value:.1%}"
        accuracy = "" if row.accuracy is None else str(row.accuracy)
        cells = (f"{row.kept:.1%}", accuracy, *against, loyalty, f"{row.drift:.4f}", f"{row.kv_share:.1%}")
        shown.add_row(row.name, *cells)
    out = console()
    out.print(shown)
    out.print(str(page), markup=False)
