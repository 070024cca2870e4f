"""`tokenprune drift`: how far a profile moves a model's last state on somebody's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenprune.cli.loading import load_model, scale_pictures
from tokenprune.cli.options import (
    DataOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    MaxPixels,
    MetricOption,
    MinPixels,
    ModelArgument,
    Side,
)
from tokenprune.cli.shell import (
    InputError,
    check_place,
    console,
    no_drawing_loses_results,
    one_line,
    print_json,
    progress,
    table,
)


def drift(
    model: ModelArgument,
    data: DataOption,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="JSON", help="[default: the one known for the model and budget]"),
    ] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="25%|0.25|192", help="[default: the profile's]")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="A method instead of a profile.")] = "auto",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images.")] = 32,
    metric: MetricOption = "cosine",
    worst: Annotated[int, typer.Option("--worst", min=0, help="Cases of largest drift to show.")] = 3,
    pictures: Annotated[
        Path | None,
        typer.Option("--pictures", metavar="FOLDER", help="Draw what was kept in the worst cases there."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts per forward.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the samples drawn.")] = 0,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    size: Side = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure drift on images without labels, with random and an even grid at the same budget beside it."""
    from tokenprune.analysis.calibration import calibration_calls, load_calibration
    from tokenprune.arguments import read_keep
    from tokenprune.profiles.profile import Profile
    from tokenprune.tune.drift import check_metric
    from tokenprune.tune.inspect import inspect_drift

    check_metric(metric)
    loaded_profile = None if profile is None else Profile.load(profile)
    if loaded_profile is not None and method != "auto":
        raise InputError("give --profile or --method, not both")
    if keep is None and loaded_profile is None:
        raise InputError("say how much to keep, for example --keep 25%, or give a --profile")
    budget = loaded_profile.keep if keep is None and loaded_profile is not None else read_keep(keep or "")
    check_place(pictures)
    arguments: dict[str, Any] = {"method": method} if loaded_profile is None else {"profile": loaded_profile}
    if loaded_profile is None or keep is not None:
        arguments["keep"] = budget
    drawn = load_calibration(data, samples, seed=seed)
    loaded, processor = load_model(model, dtype.value, device)
    scale_pictures(processor, min_pixels, max_pixels, size)
    calls = list(calibration_calls(processor, drawn, loaded.device))
    with progress("measuring", as_json) as show:
        found = inspect_drift(
            loaded, calls, arguments, budget, metric=metric, batch_size=batch_size, told=show
        )
    cases: list[dict[str, Any]] = []
    for number in found.worst(worst):
        case: dict[str, Any] = {
            "sample": number,
            "name": drawn[number].name,
            "drift": float(found.drift[number]),
            "prompt": drawn[number].prompt,
        }
        if pictures is not None:
            pictures.mkdir(exist_ok=True)
            path = pictures / f"{number:04d}.png"
            with no_drawing_loses_results():
                found.draw(loaded, processor, calls[number], drawn[number].images).save(path)
                case["picture"] = str(path)
        cases.append(case)
    if as_json:
        print_json(
            {"method": found.method, "keep": budget, "metric": metric, **found.to_dict(), "worst": cases}
        )
        return
    _show(found, f"{metric} drift of {len(calls)} prompts at {budget}", cases)


def _show(found: Any, title: str, cases: list[dict[str, Any]]) -> None:
    shown = table(title, ("", "mean", "median", "95 %", "worst"))
    for name, spread in found.spreads().items():
        shown.add_row(name, *(f"{value:.4f}" for value in spread.values()))
    out = console()
    out.print(shown)
    for case in cases:
        where = f"  {case['picture']}" if "picture" in case else ""
        text = one_line(f"{case['name'] or case['sample']}: {case['prompt'][:80]}{where}")
        out.print(f"{case['drift']:.4f}  {text}", markup=False, soft_wrap=True)
