"""`tokenprune tune`: which method and form a model stands best, measured on unlabelled pictures."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.loading import load_model
from tokenprune.cli.options import (
    DataOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    MetricOption,
    ModelArgument,
)
from tokenprune.cli.shell import InputError, check_place, console, kept, print_json, progress, table, warn
from tokenprune.errors import ConfigError
from tokenprune.optional import check_installed

if TYPE_CHECKING:
    from tokenprune.profiles.profile import Profile
    from tokenprune.tune.quick import Trial
    from tokenprune.tune.search import Found, Progress


class Cost(str, Enum):
    """A second objective beside drift."""

    flops = "flops"
    latency = "latency"


def tune(
    model: ModelArgument,
    data: DataOption,
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            metavar="25%|0.25|192|LOW:HIGH",
            help="Visual tokens to keep, on average over layers; a range of fractions with --cost.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="JSON", help="Write the profile there too.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute on 16 images: choose among forms, search no numbers.")
    ] = False,
    metric: MetricOption = "cosine",
    samples: Annotated[
        int, typer.Option("--samples", min=4, help="Images to search on; half as many again choose.")
    ] = 96,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Settings tried in all (a search).")] = 100,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Search this method; may be repeated. [default: all of them]"),
    ] = None,
    served: Annotated[
        bool,
        typer.Option(
            "--served", help="Search what vLLM serves: one cut, before the LLM, no size term; with --out."
        ),
    ] = False,
    sampler: Annotated[
        str, typer.Option("--sampler", help="Optuna's: tpe, gp, cmaes, nsga2 or random.")
    ] = "tpe",
    cost: Annotated[
        Cost | None, typer.Option("--cost", help="Search drift against this, over a range of budgets.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per forward.")] = 8,
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            metavar="URL",
            help="A database (sqlite:///study.db, postgresql://...) or journal:PATH that machines share; cache: a file "
            "in the cache folder.",
        ),
    ] = "cache",
    study: Annotated[
        str | None, typer.Option("--study", metavar="NAME", help="[default: made of what is asked]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study of that name.")] = False,
    worker: Annotated[
        int | None,
        typer.Option(
            "--worker",
            min=0,
            help="Number of this process among those that share a study; they may start together.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FOLDER", help="Write report.md and report.png there.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the samples drawn, and the sampler.")] = 0,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose a method and its parameters by drift on a few images, and keep them as a profile."""
    from tokenprune.analysis.calibration import calibration_calls, load_calibration
    from tokenprune.tune.drift import check_metric

    keep = _budget(budget)
    check_metric(metric)
    if quick and (cost is not None or isinstance(keep, tuple)):
        raise InputError("--quick takes one budget and no --cost; leave it out for a search")
    _check_out(out, report, served, quick)
    options: dict[str, Any] = {
        "methods": method,
        "served": served,
        "metric": metric,
        "cost": None if cost is None else cost.value,
        "sampler": sampler,
        "trials": trials,
        "seed": seed,
        "worker": worker,
        "batch_size": batch_size,
        "storage": storage,
        "study": study,
        "resume": resume,
    }
    if not quick:
        _check_search(options)
    # A search takes half as many again, which the best few are measured on in the end.
    drawn = load_calibration(data, 16 if quick else samples + samples // 2, seed=seed)
    loaded, processor = load_model(model, dtype.value, device)
    calls = list(calibration_calls(processor, drawn, loaded.device))
    if quick:
        _quick(loaded, calls, keep, metric, budget, out, as_json)
        return
    from tokenprune.tune.report import write_report
    from tokenprune.tune.search import search

    used = max(4, 2 * len(calls) // 3)
    with progress("searching", as_json) as show, kept(lambda: _going_on(storage, study)):

        def told(now: Progress) -> None:
            if now.trials:
                show(f"trials; least drift so far {now.best:.4g}", now.done, now.trials)
            else:
                show("single cuts measured, for schedules to begin with", now.done, 0)

        found = search(loaded, calls[:used], keep, fresh=calls[used:], told=told, **options)
    paths = _keep(found.profiles, out, remember=not served)
    names = [sample.name for sample in drawn[:used]]
    page = None if report is None else write_report(found, report, names)
    if as_json:
        print_json(_document(found, paths, page))
    else:
        _show_found(found, paths, page)


def _going_on(storage: str, study: str | None) -> str:
    where = "the cache folder" if storage == "cache" else storage
    named = "" if study is None else f" {study!r}"
    return (
        f"all finished trials are kept in the study{named} in {where}; the same command with --resume goes on"
    )


def _budget(text: str) -> Any:
    from tokenprune.arguments import read_keep

    low, colon, high = text.partition(":")
    return (read_keep(low), read_keep(high)) if colon else read_keep(text)


def _check_out(out: Path | None, report: Path | None, served: bool, quick: bool) -> None:
    """Refuse what could not be kept, before anything is measured."""
    from tokenprune.profiles.known import KIND
    from tokenprune.profiles.store import check_writable

    for path in (out, report):
        check_place(path)
    if served and (quick or out is None):
        raise InputError("--served is a search, and its profile is not for 'auto': name a file with --out")
    if out is None:
        check_writable(KIND)


def _check_search(options: dict[str, Any]) -> None:
    """Refuse what a search cannot be asked, before a large model is loaded."""
    check_installed("a search", "optuna", extra="tune", instead="--quick does without")
    from tokenprune.tune.search import SearchOptions

    SearchOptions(**options)


def _keep(profiles: list[Profile], out: Path | None, remember: bool = True) -> list[str]:
    """Profiles kept for the model, and written beside `out`, the budget in their names where there are several."""
    from tokenprune.profiles.known import WorseProfileError, remember_profile

    paths = []
    for profile in profiles:
        if out is not None:
            several = len(profiles) > 1
            path = profile.save(out.with_stem(f"{out.stem}-{profile.keep:.4g}") if several else out)
            paths.append(str(path))
        if not remember:
            continue
        try:
            held = remember_profile(profile)
        except WorseProfileError as error:
            warn(str(error))
            continue
        except ConfigError as error:
            if out is None:
                raise
            warn(f"the profile is written, and not kept for 'auto': {error}")
        if out is None:
            paths.append(str(held))
    return paths


def _document(found: Found, paths: list[str], page: Path | None) -> dict[str, Any]:
    return {
        "profile": found.profiles[0].model_dump(mode="json"),
        "path": paths[0] if paths else None,
        "paths": paths,
        "study": found.study.study_name,
        "passes": found.passes,
        "report": None if page is None else str(page),
        "trials": [
            {
                "number": t.number,
                "arguments": t.arguments,
                "samples": len(t.drift),
                "drift": t.value,
                "cost": t.cost,
            }
            for t in found.tried
        ],
    }


def _show_found(found: Found, paths: list[str], page: Path | None) -> None:
    shown = table(
        f"{len(found.tried)} trials on {found.samples} samples, {found.passes} prefills of a prompt",
        ("", "budget", "drift, searched on", "held out"),
    )
    for profile, one in zip(found.profiles, found.front, strict=True):
        own = ", ".join(f"{name}={value}" for name, value in profile.parameters.items())
        own += ", ".join(f"{stage.layer}: {stage.method}" for stage in profile.stages)
        held = found.held_out.get("found") if one is found.front[0] else None
        mean = "" if held is None else f"{held.mean():.4f}"
        shown.add_row(f"{profile.method} {own}", f"{profile.keep:.4g}", f"{one.drift.mean():.4f}", mean)
    for name, drift in found.controls.items():
        held = found.held_out.get(name)
        mean = "" if held is None else f"{held.mean():.4f}"
        shown.add_row(f"{name}, before the LLM", f"{found.profiles[0].keep:.4g}", f"{drift.mean():.4f}", mean)
    out = console()
    out.print(shown)
    for caution in found.cautions():
        warn(caution)
    for path in paths:
        out.print(f"kept for this model; wrap(model, profile={path!r}) takes it anywhere", markup=False)
    if page is not None:
        out.print(f"report: {page}", markup=False)
    out.print(f"study {found.study.study_name}; --resume goes on with it", markup=False)


def _quick(
    model: Any, calls: list[Any], keep: Any, metric: str, budget: str, out: Path | None, as_json: bool
) -> None:
    from tokenprune.tune.quick import quick

    with progress("trying forms", as_json) as show:

        def told(trial: Trial, done: int, expected: int) -> None:
            show(f"forms; the last {trial.name()}", done, expected)

        profile, trials = quick(model, calls, keep, metric=metric, told=told)
    paths = _keep([profile], out)
    path = paths[0] if paths else None
    if as_json:
        rows = [
            {"setting": t.name(), "samples": len(t.drift), "drift": t.mean if len(t.drift) else None}
            for t in trials
        ]
        print_json({"profile": profile.model_dump(mode="json"), "path": path, "trials": rows})
        return
    _show_quick(trials, metric, budget, path)


def _show_quick(trials: list[Trial], metric: str, budget: str, path: str | None) -> None:
    shown = table(
        f"drift ({metric}) at {budget}; the better half of each round went on",
        ("setting", "samples", "drift"),
    )
    for trial in trials:
        shown.add_row(trial.name(), str(len(trial.drift)), "-" if trial.failed else f"{trial.mean:.4f}")
    console().print(shown)
    if path is not None:
        console().print(f"kept for this model; wrap(model, profile={path!r}) takes it anywhere", markup=False)
