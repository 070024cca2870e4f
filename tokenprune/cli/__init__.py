"""The command line: `tokenprune demo`, `run`, `ecl`, `tune`, `drift`, `compare`, `bench`, `methods`, `models`, `env`.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tokenprune.cli import bench, catalog, compare, demo, drift, ecl, environment, run, tune
from tokenprune.cli.shell import PROGRAM, OneLineErrors

app = typer.Typer(
    name=PROGRAM,
    cls=OneLineErrors,
    help="Fewer visual tokens, the same answers: prune image tokens inside Hugging Face multimodal models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    demo.demo,
    run.run,
    ecl.ecl,
    tune.tune,
    drift.drift,
    compare.compare,
    bench.bench,
    catalog.methods,
    catalog.models,
    environment.env,
):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _options(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (after a command too).")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Entry point of the console script."""
    app(prog_name=PROGRAM)


__all__ = ["app", "main"]
