"""`tokenprune profiles list | show | rm | push`: what is known about models here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenprune.cli.options import JsonOption
from tokenprune.cli.shell import InputError, console, print_json

if TYPE_CHECKING:
    from tokenprune.profiles.known import Listed

commands = typer.Typer(
    help="The profiles that are known here: your own, and those that came with the package."
)
Which = Annotated[
    str, typer.Argument(metavar="HASH|FILE", help="The first digits of a profile's hash, or its file.")
]


@commands.command("list")
def list_(as_json: JsonOption = False) -> None:
    """What 'auto' can take, your own first."""
    from tokenprune.profiles.known import list_profiles

    found = list_profiles()
    if as_json:
        print_json([{"path": str(own.path), "bundled": own.bundled, **_facts(own)} for own in found])
        return
    from rich.table import Table

    table = Table(title="profiles; your own come before bundled ones", title_justify="left")
    for column in ("hash", "model", "keep", "method", "drift", "random", "made", ""):
        table.add_column(column, overflow="fold")
    for own in found:
        facts = _facts(own)
        drifts = ["-" if facts[name] is None else f"{facts[name]:.4f}" for name in ("drift", "random")]
        texts = [str(facts[name]) for name in ("hash", "model", "keep", "method")]
        table.add_row(*texts, *drifts, str(facts["made"]), "bundled" if own.bundled else "yours")
    console().print(table)


@commands.command()
def show(which: Which) -> None:
    """One of them, as it is."""
    typer.echo(_find(which).profile.model_dump_json(indent=1))


@commands.command()
def rm(which: Which) -> None:
    """Forget one of your own; 'auto' then takes the next."""
    own = _find(which)
    if own.bundled:
        raise InputError("that one came with the package; name a method or a profile to have another taken")
    own.path.unlink()
    console().print(f"removed {own.path}", markup=False)


@commands.command()
def push(
    which: Which,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model repository of the hub.")],
    file: Annotated[str, typer.Option("--file", help="Its name there.")] = "tokenprune.json",
) -> None:
    """Put one into a repository of the Hugging Face hub; Profile.from_hub reads it."""
    console().print(_find(which).profile.push_to_hub(repository, file), markup=False)


def _facts(own: Listed) -> dict[str, object]:
    profile, measured = own.profile, own.profile.measured
    method = "; ".join(f"{s.layer}: {s.method}" for s in profile.stages) or profile.method
    return {
        "hash": profile.hash[:8],
        "model": profile.name or f"{profile.family} {profile.model[:8]}",
        "keep": profile.keep,
        "method": method,
        "drift": None if measured is None else measured.drift,
        "random": None if measured is None else measured.controls.get("random"),
        "made": profile.made.date,
    }


def _find(which: str) -> Listed:
    from tokenprune.profiles.known import Listed, list_profiles
    from tokenprune.profiles.profile import Profile

    if which.endswith(".json"):
        path = Path(which)
        return Listed(Profile.load(path), path, bundled=False)
    found = [own for own in list_profiles() if own.profile.hash.startswith(which)]
    if len(found) != 1 or len(which) < 4:
        raise InputError(
            f"{'no profile has' if not found else 'not one profile alone has'} a hash that begins with {which!r} (4 "
            f"digits or more); 'tokenprune profiles list' shows them"
        )
    return found[0]
