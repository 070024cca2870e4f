"""`tokenprune run`: one question about images, answered by a pruned model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune import testbeds
from tokenprune.cli.loading import load_images, load_model, scale_pictures
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
from tokenprune.cli.parse import parse_pairs
from tokenprune.cli.shell import (
    InputError,
    check_place,
    console,
    no_drawing_loses_results,
    one_line,
    print_json,
    save_picture,
)

if TYPE_CHECKING:
    from PIL import Image

    from tokenprune.reporting import Report


class Budget(str, Enum):
    """What --keep means."""

    average = "average"
    after_cut = "after_cut"


def run(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="One or more image files.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.")],
    method: Annotated[
        str, typer.Option("--method", help="See 'tokenprune methods'; auto takes what was tuned.")
    ] = "auto",
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="25%|0.25|192", help="Visual tokens to keep per image.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            metavar="INTEGER|auto",
            help="Decoder layer the cut enters; 0 is before the LLM, auto what 'tokenprune ecl' found.",
        ),
    ] = None,
    budget: Annotated[
        Budget,
        typer.Option("--budget", help="--keep is the average over layers, or what remains after the cut."),
    ] = Budget.average,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="NAME=VALUE",
            help="A parameter of the method, or any argument of wrap; repeatable.",
        ),
    ] = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    size: Side = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="Show the unpruned answer too.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="PNG", help="Draw the kept tokens over the images.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about images and prune the visual tokens."""
    arguments = _prune_arguments(method, keep, layer, budget, param or [])
    pictures = load_images(images)
    check_place(picture, ".png")
    testbed = testbeds.find(model)
    if testbed is not None:
        question = testbed.words(question)

    import tokenprune
    from tokenprune.analysis.calibration import make_prompt

    loaded, processor = load_model(model, dtype.value, device)
    scale_pictures(processor, min_pixels, max_pixels, size)
    inputs = make_prompt(processor, pictures, question).to(loaded.device, dtype=loaded.dtype)
    with tokenprune.pruned(loaded, **arguments):
        answer = _answer(loaded, processor, inputs, max_new_tokens)
        report = tokenprune.report(loaded)
    document: dict[str, Any] = {
        "model": model,
        "images": [str(i) for i in images],
        "question": question,
        "answer": answer,
    }
    if compare:
        document["unpruned_answer"] = _answer(loaded, processor, inputs, max_new_tokens)
    document |= {"report": report.to_dict(), "keep_lists": report.keep_lists}
    if picture is not None:
        with no_drawing_loses_results():
            _save(picture, report, pictures, processor)
            document["picture"] = str(picture)
    if as_json:
        print_json(document)
    else:
        _show(document, report)


def _prune_arguments(
    method: str, keep: str | None, layer: str | None, budget: Budget, param: list[str]
) -> dict[str, Any]:
    """The arguments of `wrap`; what can be checked without a model is, before a large one is loaded."""
    from tokenprune.arguments import AUTO, DEFAULT, Arguments
    from tokenprune.methods import make_method

    texts = {"method": method, **parse_pairs(method, param)}
    meaning = None if budget is Budget.average else budget.value
    texts |= {
        n: text for n, text in (("keep", keep), ("layer", layer), ("budget", meaning)) if text is not None
    }
    if keep is not None and method == "none":
        raise InputError("method 'none' keeps everything: leave --keep out, or choose another --method")
    asked = Arguments.from_text(texts)
    make_method(DEFAULT if asked.method == AUTO else asked.method, dict(asked.parameters))
    cuts: Any = asked.cuts or asked.stages
    if method != "none" and asked.keep is None and not (cuts and cuts[-1].keep):
        raise InputError("say how much to keep, for example --keep 25% or --keep 144")
    return asked.given()


def _answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    import torch

    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return " ".join(processor.batch_decode(new, skip_special_tokens=True)[0].split())


def _save(path: Path, report: Report, images: list[Image.Image], processor: Any) -> None:
    from tokenprune.draw import tile

    drawn = report.draw(images, processor=processor, stages=True)
    save_picture(tile(drawn, columns=1 if len(report.layers_cut) > 1 else len(drawn)), path)


def _show(document: dict[str, Any], report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = {"question": document["question"], report.method: document["answer"]}
    rows |= {
        name: document[key]
        for name, key in (("unpruned", "unpruned_answer"), ("picture", "picture"))
        if key in document
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, Text(one_line(value)))  # the model's own words: brackets in them are no markup
    out = console()
    out.print(table)
    out.print()
    out.print(str(report), markup=False)
