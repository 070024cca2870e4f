"""The command line: `tokenprune app`, `run`, `tune`, `compare` and the rest.

Other distributions add commands by entry points, group ``tokenprune.commands``: the testbed's brings `demo`.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from tokenprune import testbeds
from tokenprune.cli import app as page
from tokenprune.cli import bench, catalog, compare, drift, ecl, environment, profiles, run, tune
from tokenprune.cli.shell import PROGRAM, InputError, OneLineErrors

app = typer.Typer(
    name=PROGRAM,
    cls=OneLineErrors,
    help="Fewer visual tokens, the same answers: prune image tokens inside Hugging Face multimodal models.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_ANY_WORDS = {"ignore_unknown_options": True, "allow_extra_args": True}


def _add(entry: EntryPoint) -> None:
    """A command of another distribution; where that is broken, one that says so, and the others are as they were."""
    try:
        app.command(entry.name)(entry.load())
    except Exception as error:  # whatever its import raises
        _refuse(entry.name, f"the command {entry.name!r} ({entry.value}) cannot be loaded: {error}")


def _refuse(name: str, reason: str) -> None:
    """A command that only says why it is not there."""

    def refused() -> None:
        raise InputError(reason)

    app.command(name, context_settings=_ANY_WORDS, hidden=True)(refused)


_added = entry_points(group="tokenprune.commands")
for _entry in _added:
    _add(_entry)
if "demo" not in _added.names:
    _refuse("demo", f"the demo comes with the testbed, which is not installed: {testbeds.INSTALL}")
for _command in (
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
