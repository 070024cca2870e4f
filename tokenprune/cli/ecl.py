"""`tokenprune ecl`: where a model's visual tokens collapse, and what its attention does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.cli.loading import load_model
from tokenprune.cli.options import DataOption, DeviceOption, Dtype, DtypeOption, JsonOption, ModelArgument
from tokenprune.cli.shell import InputError, check_place, console, print_json, progress, save_picture, table
from tokenprune.optional import check_installed

if TYPE_CHECKING:
    from tokenprune.analysis.calibration import CalibrationSample
    from tokenprune.analysis.layers import LayerStatistics
    from tokenprune.profiles.collapse import Collapse

MAPS = 4  # prompts that are drawn


def ecl(
    model: ModelArgument,
    data: DataOption,
    samples: Annotated[int, typer.Option("--samples", min=16, help="Images to read at most.")] = 64,
    estimator: Annotated[
        str, typer.Option("--estimator", help="What is followed through the layers, or 'all'.")
    ] = "von_neumann",
    fallback_layer: Annotated[
        int | None, typer.Option("--fallback-layer", help="The layer to use when there is no clear collapse.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="PNG", help="Draw the curves with their intervals.")
    ] = None,
    attention_figure: Annotated[
        Path | None, typer.Option("--attention-figure", metavar="PNG", help="Draw attention by layer.")
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option("--maps", metavar="PNG", help="Draw every token's entropy over the first images."),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the samples drawn and of the bootstrap.")
    ] = 0,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Keep the layer for wrap(model, layer='auto').")
    ] = True,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the Entropy Collapse Layer of a model on calibration images, one prefill each."""
    from tokenprune.analysis.calibration import load_calibration
    from tokenprune.estimators import ESTIMATORS, make_estimator

    names = list(ESTIMATORS) if estimator == "all" else [make_estimator(estimator).name]
    figures = [path for path in (figure, attention_figure, maps) if path is not None]
    for path in figures:
        check_place(path, ".png")
    if figures:
        check_installed("a figure", "matplotlib", extra="plot")
    from tokenprune.analysis.collapse import MIN_IMAGES, NoCollapseError, begin, find_collapse, settle

    calibration = load_calibration(data, samples, seed=seed)
    images = sum(len(sample.images) for sample in calibration)
    if images < MIN_IMAGES:
        raise InputError(
            f"--data {data} has {images} images; at least {MIN_IMAGES} are needed to tell a collapse"
        )
    loaded, processor = load_model(model, dtype.value, device)
    own = begin(loaded, fallback_layer, save=save)

    statistics = _read(loaded, processor, calibration, names, MAPS if maps else 0, quiet=as_json)
    found = {name: find_collapse(values, name, seed=seed) for name, values in statistics.visual.items()}
    unclear: NoCollapseError | None = None
    try:
        found[names[0]] = settle(found[names[0]], own, fallback_layer, save=save)
    except NoCollapseError as error:
        unclear = error
    text = {name: _mean(values) for name, values in statistics.text.items()}
    _draw_curves(figure, attention_figure, found, text, statistics)
    if maps is not None:
        _draw_maps(maps, statistics, processor, calibration, found[names[0]].steepest)
    if as_json:
        print_json(_document(found, statistics, text))
    else:
        _show(found, statistics, text, saved=save and unclear is None)
    if unclear is not None:
        raise InputError(f"{unclear.collapse.verdict()}; choose a layer yourself, or give --fallback-layer")


def _read(
    model: Any, processor: Any, samples: list[CalibrationSample], names: list[str], maps: int, quiet: bool
) -> LayerStatistics:
    from tokenprune.analysis.calibration import calibration_calls
    from tokenprune.analysis.layers import read_layers

    with progress("reading", quiet) as show:

        def calls() -> Iterator[Any]:
            for number, inputs in enumerate(calibration_calls(processor, samples, model.device), 1):
                yield inputs
                show("prompts", number, len(samples))

        return read_layers(model, calls(), names, maps=maps)


def _mean(values: Any) -> list[Any]:
    """Mean over rows, nested as deep as what is left; rows with a NaN count where they have none."""
    import numpy as np

    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(0), known.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).tolist()


def _without_nan(values: Any) -> Any:
    """JSON has no NaN: None in its place."""
    if isinstance(values, list):
        return [_without_nan(v) for v in values]
    return None if values != values else values


def _draw_curves(
    figure: Path | None,
    attention_figure: Path | None,
    found: dict[str, Collapse],
    text: dict[str, list[float]],
    statistics: LayerStatistics,
) -> None:
    if figure is not None or attention_figure is not None:
        from tokenprune.analysis.plots import plot_attention, plot_collapse

        if figure is not None:
            plot_collapse(found, figure, text=text)
        if attention_figure is not None:
            plot_attention(statistics, attention_figure)


def _draw_maps(
    path: Path, statistics: LayerStatistics, processor: Any, samples: list[CalibrationSample], layer: int
) -> None:
    from tokenprune.draw import draw_heat_views, tile
    from tokenprune.images import as_seen
    from tokenprune.tiling import lay_out

    caption = f"matrix entropy of the queries of layer {layer - 1}"
    images = [
        as_seen(processor.image_processor, image) for sample in samples[:MAPS] for image in sample.images
    ]
    values = [float(v) for of_image in statistics.maps for v in of_image[layer - 1]]
    drawn = [draw_heat_views(views, values, caption) for views in lay_out(statistics.images, images)]
    save_picture(tile(drawn, columns=len(drawn)), path)


def _document(
    found: dict[str, Collapse], statistics: LayerStatistics, text: dict[str, list[float]]
) -> dict[str, Any]:
    return {
        "collapse": {
            name: {**c.model_dump(mode="json"), "verdict": c.verdict()} for name, c in found.items()
        },
        "text": {name: _without_nan(values) for name, values in text.items()},
        "attention_entropy": _without_nan(_mean(statistics.attention_entropy)),
        "visual_share": _without_nan(_mean(statistics.visual_share)),
    }


def _show(
    found: dict[str, Collapse], statistics: LayerStatistics, text: dict[str, list[float]], saved: bool
) -> None:
    out = console()
    first = next(iter(found.values()))
    shown = table(
        f"{first.estimator} diversity on entering each layer, {first.images} images",
        ("layer", "visual tokens", "95 %", "drop", "95 %", "text tokens", "attention entropy", "on visual"),
    )
    entropy = [sum(heads) / len(heads) for heads in _mean(statistics.attention_entropy)]
    share = _mean(statistics.visual_share)
    for l, mean in enumerate(first.mean):
        shown.add_row(
            f"{l}" if l < statistics.num_layers else "norm",
            f"{mean:.4f}",
            f"{first.low[l]:.4f} to {first.high[l]:.4f}",
            f"{first.drop[l]:+.4f}" if l else "",
            f"{first.drop_low[l]:+.4f} to {first.drop_high[l]:+.4f}" if l else "",
            f"{text[first.estimator][l]:.4f}",
            f"{entropy[l]:.3f}" if l < statistics.num_layers else "",
            f"{share[l]:.1%}" if l < statistics.num_layers else "",
            style="bold" if l == first.steepest else None,
        )
    out.print(shown)
    for collapse in found.values():
        out.print(collapse.verdict(), markup=False)
    if saved:
        out.print(f"layer {first.layer} is kept for wrap(model, layer='auto')", markup=False)
