"""`tokenprune tune`: which method and form a model stands best, measured on unlabelled pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.loading import load_model
from tokenprune.cli.options import DataOption, DeviceOption, Dtype, DtypeOption, JsonOption, ModelArgument
from tokenprune.cli.shell import InputError, console, print_json
from tokenprune.files import given_path

if TYPE_CHECKING:
    from tokenprune.tune.quick import Trial


def tune(
    model: ModelArgument,
    data: DataOption,
    budget: Annotated[
        str,
        typer.Option(
            "--budget", metavar="25%|0.25|192", help="Visual tokens to keep, on average over layers."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="JSON", help="Write the profile there too.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="A minute on 16 images; a full search is not built yet.")
    ] = True,
    metric: Annotated[
        str, typer.Option("--metric", help="Drift: cosine, relative_l2, kl or cauchy_schwarz.")
    ] = "cosine",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the samples drawn.")] = 0,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose a method and its form by drift on a few images, and keep it as a profile."""
    from tokenprune.analysis.calibration import calibration_calls, load_calibration
    from tokenprune.arguments import read_keep
    from tokenprune.profiles.known import remember_profile
    from tokenprune.tune import quick as search
    from tokenprune.tune.drift import check_metric

    if not quick:
        raise InputError("a full search is not built yet; leave --full out")
    keep = read_keep(budget)
    check_metric(metric)
    if out is not None and not given_path(out).parent.is_dir():
        raise InputError(f"there is no folder {str(out.parent)!r}; make it first")
    samples = load_calibration(data, 16, seed=seed)
    loaded, processor = load_model(model, dtype.value, device)
    profile, trials = search(
        loaded, list(calibration_calls(processor, samples, loaded.device)), keep, metric=metric
    )
    kept = remember_profile(profile)
    if out is not None:
        profile.save(out)
    rows = [
        {"setting": t.name(), "samples": len(t.drift), "drift": t.mean if len(t.drift) else None}
        for t in trials
    ]
    document: dict[str, Any] = {
        "profile": profile.model_dump(mode="json"),
        "path": str(out or kept),
        "trials": rows,
    }
    if as_json:
        print_json(document)
        return
    _show(trials, metric, budget, str(out or kept))


def _show(trials: list[Trial], metric: str, budget: str, path: str) -> None:
    from rich.table import Table

    table = Table(
        title=f"drift ({metric}) at {budget}; the better half of each round went on", title_justify="left"
    )
    for column in ("setting", "samples", "drift"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for trial in trials:
        table.add_row(trial.name(), str(len(trial.drift)), "-" if trial.failed else f"{trial.mean:.4f}")
    console().print(table)
    console().print(f"kept for this model; wrap(model, profile={path!r}) takes it anywhere", markup=False)
