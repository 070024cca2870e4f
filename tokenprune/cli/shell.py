"""What all commands share: errors of one line, JSON, tables."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from tokenprune.errors import NothingPrunedWarning, SkippedFilesWarning, TokenPruneError, UntestedWarning
from tokenprune.files import given_path

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.table import Table

PROGRAM = "tokenprune"
USAGE_ERROR = 2
INTERRUPTED = 130  # as shells have it
EVERY = 10.0  # seconds between lines that say how far something is, where there is no bar

# Typer brings its own copy of click's exceptions in some releases and uses click's in others.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class InputError(TokenPruneError, ValueError):
    """Something given on the command line is unusable; the message says what to give instead."""


class OneLineErrors(TyperGroup):
    """Turns every refusal into one line on stderr and exit code 2; `--debug` shows the traceback instead."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in given
        if {"-v", "--verbose"} & set(given):
            logging.basicConfig(format="%(message)s")
            logging.getLogger(PROGRAM).setLevel(logging.INFO)
        # The flags belong to the program, but people add them at the end of what failed.
        given = [arg for arg in given if arg not in ("--debug", "-v", "--verbose")]
        try:
            with short_warnings(debug):
                code = super().main(given, *more, **{**options, "standalone_mode": False})
        except KeyboardInterrupt:
            code = INTERRUPTED
            typer.echo("interrupted", err=True)
        except (TokenPruneError, OSError, _UsageError, typer.Abort) as error:
            if debug:
                traceback.print_exc()
            message = one_line(_message(error))
            typer.echo(f"error: {message}", err=True)
            if "--json" in given:
                print_json({"error": message})
            code = USAGE_ERROR
        sys.exit(code if isinstance(code, int) else 0)


def _message(error: Exception) -> str:
    if isinstance(error, typer.Abort):
        return "aborted"
    if not isinstance(error, _UsageError):
        return str(error)
    usage: Any = error
    path = usage.ctx.command_path if usage.ctx else PROGRAM
    return f"{usage.format_message().rstrip('.')}; see '{path} --help'"


@contextmanager
def short_warnings(debug: bool) -> Iterator[None]:
    """Our own warning on one line; other libraries' only with --debug."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            for ours in (NothingPrunedWarning, SkippedFilesWarning, UntestedWarning):
                warnings.simplefilter("always", ours)
            warnings.showwarning = lambda message, *_, **__: warn(str(message))
        yield


def warn(message: str) -> None:
    """Say something on stderr, on one line, and go on."""
    typer.echo(f"warning: {one_line(message)}", err=True)


@contextmanager
def no_drawing_loses_results() -> Iterator[None]:
    """Inside, what goes wrong with a picture is a warning: the numbers it belongs to took long to get."""
    try:
        yield
    except InputError:  # the path that was given
        raise
    except Exception as error:  # whatever Pillow and the layouts of new families come up with
        warn(f"the picture could not be drawn: {error}")


def one_line(text: str) -> str:
    """A text from anywhere on one line, without the escapes by which it could steer the terminal."""
    return " ".join(printable(text).split())


def printable(text: str) -> str:
    """A text with a question mark for every character that would steer the terminal."""
    return "".join(c if c.isprintable() or c.isspace() else "?" for c in text)


def print_json(document: Any) -> None:
    """The one JSON document of a command, on stdout."""
    typer.echo(json.dumps(document, indent=2))


def console(stderr: bool = False) -> Console:
    """A rich console; where it does not end in a terminal, wide enough for every table."""
    from rich.console import Console

    class Plain(Console):
        """Texts may come from files and models: what would steer the terminal is shown, not sent."""

        def print(self, *shown: Any, **options: Any) -> None:
            super().print(*(printable(own) if isinstance(own, str) else own for own in shown), **options)

    stream = sys.stderr if stderr else sys.stdout
    return Plain(stderr=stderr, highlight=False, width=None if stream.isatty() else 120)


def table(title: str, columns: Sequence[str], *, whole: bool = False) -> Table:
    """For the terminal: the first column is text, the others are numbers, in one line each where they are `whole`."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        justify: Any = "right" if number else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=whole and number > 0)
    return made


def check_place(path: Path | None, suffix: str = "") -> None:
    """Refuse a file that could not be written, before anything is measured for it.

    Args:
        path: of the file; None is none.
        suffix: that it must have.

    Raises:
        InputError: it has another, or lies in a folder that is not there.
        ConfigError: see `given_path`.
    """
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"give a name that ends in {suffix}, not {path.name!r}")
    if not given_path(path).parent.is_dir():
        raise InputError(f"there is no folder {str(path.parent)!r}; make it first")


def save_picture(picture: Image, path: Path) -> None:
    """Raises InputError where it cannot be written."""
    try:
        picture.save(path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


@contextmanager
def kept(told: Callable[[], str]) -> Iterator[None]:
    """Inside, Ctrl-C ends the program with what is kept of its work, and how to go on with it."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(f"interrupted: {one_line(told())}", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def progress(first: str, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Says how far something is, on stderr: a bar on a terminal, else a line now and then.

    What is given is called with a text, how much is done, and of how much (0: nobody knows).
    """
    from rich import progress as bars

    shown = console(stderr=True)
    if not quiet and not shown.is_terminal:
        yield _lines(first)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=shown, transient=True, disable=quiet) as bar:
        task = bar.add_task(first, total=None)
        yield lambda text, done, total: bar.update(
            task, description=text, completed=done, total=total or None
        )


def _lines(first: str) -> Callable[[str, int, int], None]:
    typer.echo(f"{first} ...", err=True)
    last = began = time.monotonic()

    def show(text: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done != total and now - last < EVERY:
            return
        last = now
        left = f", about {(now - began) / done * (total - done):.0f} s left" if 0 < done < total else ""
        of = f" of {total}" if total else ""
        typer.echo(f"{one_line(text)}: {done}{of} after {now - began:.0f} s{left}", err=True)

    return show


def quiet_transformers() -> None:
    """Silence what loading prints; the bars of downloads stay."""
    import transformers
    from huggingface_hub import utils as hub

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    hub.enable_progress_bars()  # type: ignore[attr-defined]
