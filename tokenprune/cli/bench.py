"""`tokenprune bench`: how fast pruning is on this machine, against the unpruned model and against the ideal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune import tables
from tokenprune.cli.loading import check_device, load_model
from tokenprune.cli.options import DeviceOption, Dtype, DtypeOption, JsonOption
from tokenprune.cli.shell import InputError, console, print_json

if TYPE_CHECKING:
    from tokenprune.bench.geometry import Subject
    from tokenprune.bench.measure import Plan

NAMES = ("cpu", "llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "tiny")


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A model of your own, or 'small' or 'smol'. Default: --geometry."
        ),
    ] = None,
    geometry: Annotated[
        str, typer.Option("--geometry", help=f"Random weights of this size: {', '.join(NAMES)}.")
    ] = "cpu",
    batch: Annotated[
        list[str] | None,
        typer.Option(
            "--batch",
            metavar="N[r]",
            help="Rows; 8r: of different lengths, padded. Repeatable. [default: 1, 8, 8r]",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME[,PARAM=VALUE]", help="What prunes.")
    ] = "auto",
    keep: Annotated[str, typer.Option("--keep", metavar="25%|192", help="Average over layers.")] = "25%",
    layer: Annotated[
        int | None, typer.Option("--layer", help="The cut enters this layer. [default: the method's own]")
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=3, help="Rounds, in each of which all arms run.")
    ] = 15,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Decoded tokens per round.")] = 8,
    answer: Annotated[
        list[int] | None,
        typer.Option(
            "--answer", help="New tokens of whole answers, 32 or 256; 0: none. Repeatable. [default: 32, 256]"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    clock: Annotated[
        str, typer.Option("--clock", help="wall; or cpu, which leaves other processes' time out.")
    ] = "wall",
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to this file.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time prefill, decoding and whole answers, pruned and not, in turn (A B A B), medians of paired ratios.

    Random weights, no downloads; on a model of your own, one picture of noise. `ideal` is what pruning could cost at
    best: stock layers on tokens chosen beforehand.
    """
    from tokenprune.bench.measure import Bench, measure
    from tokenprune.bench.output import table

    sizes = [_batch(text) for text in batch or ("1", "8", *(() if model else ("8r",)))]
    if model and any(ragged for _, ragged in sizes):
        raise InputError("--batch 8r needs a geometry: a model of your own is asked the same in every row")
    if csv is not None and csv.is_file() and csv.stat().st_size:
        tables.check(csv)
    plan = _plan(method, keep, layer, repeats, steps, answer, clock)
    subject = _subject(model, geometry, dtype.value, device, threads, plan)
    rows: list[dict[str, Any]] = []
    for size, ragged in sizes:
        rows.append(measure(Bench(subject, size, ragged, plan)))
        if csv is not None:
            tables.append(csv, rows[-1])
        if not as_json:
            console().print(table(rows[-1]))
    if as_json:
        print_json({"rows": rows})


def _plan(
    method: str, keep: str, layer: int | None, repeats: int, steps: int, answer: list[int] | None, clock: str
) -> Plan:
    from tokenprune.arguments import AUTO, Arguments, read_keep
    from tokenprune.bench.measure import Plan
    from tokenprune.methods import make_method
    from tokenprune_kernels.timing import CLOCKS

    if clock not in CLOCKS:
        raise InputError(f"--clock is one of {', '.join(CLOCKS)}, not {clock!r}")
    totals = tuple(n for n in ([32, 256] if answer is None else answer) if n)
    if not set(totals) <= {32, 256}:
        raise InputError("--answer is 32, 256 or 0")
    name, *words = method.split(",")
    if name == AUTO:
        if words or layer is not None:
            raise InputError("--method auto chooses parameters and layers itself; name a method to set them")
        return Plan(name, {}, read_keep(keep), None, repeats, steps, totals, clock)
    given = Arguments.from_text({"method": name, **dict(_pair(word) for word in words)})
    if others := sorted(given.given().keys() - {"method", *given.parameters}):
        raise InputError(
            f"--method takes parameters of {name!r} only, not {', '.join(others)}; there are --layer and --keep"
        )
    make_method(name, dict(given.parameters))
    return Plan(name, given.parameters, read_keep(keep), layer, repeats, steps, totals, clock)


def _subject(
    model: str | None, geometry: str, dtype: str, device: str | None, threads: int | None, plan: Plan
) -> Subject:
    import torch

    from tokenprune.arguments import AUTO
    from tokenprune.bench.geometry import GEOMETRIES, own_subject, random_subject
    from tokenprune.methods import make_method

    if geometry not in GEOMETRIES:
        raise InputError(f"--geometry is one of {', '.join(GEOMETRIES)}, not {geometry!r}")
    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        # On Hopper torch prefers cuDNN's attention, which takes a millisecond of the host in each call of a decoding
        # step (docs/performance.md); the rest would drown in it.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if model is not None:
        return own_subject(model, *load_model(model, dtype, device))
    needs = None if plan.method == AUTO else make_method(plan.method, dict(plan.parameters)).needs()
    looks = needs is None or needs.vision is not None or needs.pixels is not None or needs.digest
    return random_subject(
        GEOMETRIES[geometry], check_device(None if device == "auto" else device), looks=looks
    )


def _batch(text: str) -> tuple[int, bool]:
    """ "8" -> (8, False), "8r" -> (8, True): ragged."""
    size = text.removesuffix("r")
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"--batch takes a number of rows, with an r for ragged ones, not {text!r}")
    return int(size), text.endswith("r")


def _pair(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise InputError(f"--method takes NAME,PARAM=VALUE,..., not {word!r}")
    return name, value
