"""The command line: `tokenprune demo`, `app`, `run`, `tune`, `compare` and the rest.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tokenprune.cli import app as page
from tokenprune.cli import bench, catalog, compare, demo, drift, ecl, environment, profiles, run, tune
from tokenprune.cli.shell import PROGRAM, OneLineErrors

app = typer.Typer(
    name=PROGRAM,
    cls=OneLineErrors,
    help="Fewer visual tokens, the same answers: prune image tokens inside Hugging Face multimodal models.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    demo.demo,
    page.app,
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
app.add_typer(profiles.commands, name="profiles")


@app.callback(invoke_without_command=True)
def _options(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is decided (anywhere).")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (after a command too).")
    ] = False,
) -> None:
    if version:
        from tokenprune import __version__

        typer.echo(f"tokenprune {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Entry point of the console script."""
    app(prog_name=PROGRAM)


__all__ = ["app", "main"]
