"""`tokenprune app`: a page to play with."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tokenprune import testbeds
from tokenprune.cli.loading import load_model
from tokenprune.cli.options import DeviceOption, Dtype, DtypeOption
from tokenprune.cli.shell import InputError, console
from tokenprune.optional import check_installed


def app(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]", help="A local folder, a hub id, or 'small' or 'smol': the testbed's."
        ),
    ] = "small",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0 opens the page to your network.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="[default: the first free one]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")] = 32,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
) -> None:
    """A page with your picture, the whole and the pruned answer, and what was kept. On this machine only."""
    check_installed("the page", "gradio", extra="app")
    loaded, processor = load_model(model, dtype.value, device)

    from tokenprune.app.asking import Asking
    from tokenprune.app.page import build, serve

    testbed = testbeds.find(model)
    asking = Asking(model, loaded, processor, testbed.words if testbed else str, max_new_tokens)
    page = build(asking, _examples(testbed))
    try:
        address = serve(page, host, port)
    except OSError as error:
        raise InputError(f"cannot listen at {host}: {error}; name another --port") from error
    console().print(f"{address}  (Ctrl-C ends it)", markup=False)
    page.block_thread()


def _examples(testbed: testbeds.Testbed | None) -> list[tuple[Any, str]]:
    """Pictures that a testbed was not trained on, with a question each; for other models with one of their kind."""
    from PIL import Image

    shown = testbed or (testbeds.find(testbeds.OURS[0]) if testbeds.names() else None)
    samples = [sample for sample in shown.questions(40, 0) if len(sample.images) == 1] if shown else []
    return [
        (Image.fromarray(sample.images[0]), sample.question if testbed else "What is in the picture?")
        for sample in samples[8:24:4]
    ]
