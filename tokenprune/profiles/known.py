"""Profiles known for a model: left in the user's cache by `tokenprune tune`, or bundled with the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenprune.budget import Keep
from tokenprune.errors import ConfigError
from tokenprune.profiles.profile import Profile
from tokenprune.profiles.store import stored_path, write_document

KIND = "profiles"
BUNDLED = Path(__file__).with_name("bundled")


@dataclass(frozen=True)
class Listed:
    """A profile that is known here: its file, and whether it came with the package."""

    profile: Profile
    path: Path
    bundled: bool


def remember_profile(profile: Profile) -> Path:
    """Keep a profile for its model and budget, in place of an older one that was measured no better.

    Raises:
        WorseProfileError: the one that is there drifted less on the same samples, and stays.
        ConfigError: the cache folder cannot be written to.
    """
    path = stored_path(KIND, f"{profile.model}-{profile.keep}")
    older = Profile.load(path) if path.is_file() else None
    if older is not None and _is_better(older, profile):
        assert older.measured is not None and profile.measured is not None
        raise WorseProfileError(
            f"the profile known for this model and budget drifts less on the same samples ({older.measured.drift:.4g}, "
            f"of {older.made.date}; this one {profile.measured.drift:.4g}) and stays; remove it first with "
            f"'tokenprune profiles rm {older.hash[:8]}' if this one is to be taken"
        )
    write_document(profile.sealed(), path)
    return path


class WorseProfileError(ConfigError):
    """A profile would take the place of a better one."""


def _is_better(one: Profile, other: Profile) -> bool:
    a, b = one.measured, other.measured
    if a is None or b is None or one.hash == other.hash:
        return False
    same = a.metric == b.metric and bool(one.made.data) and one.made.data == other.made.data
    return same and a.drift < b.drift


def list_profiles() -> list[Listed]:
    """All that are known here, the user's own first.

    Raises:
        ConfigError: a file that is no profile; names it.
    """
    folders = ((stored_path(KIND, "").parent, False), (BUNDLED, True))
    return [
        Listed(Profile.load(path), path, bundled)
        for folder, bundled in folders
        if folder.is_dir()
        for path in sorted(folder.glob("*-*.json"))
    ]


def known_profile(model: str, keep: Keep) -> Profile | None:
    """The profile for the model with that fingerprint whose budget is nearest from above, else nearest from below.

    The user's own come before bundled ones. A count and a fraction do not compare: those of the other kind come last.

    Raises:
        ConfigError: a file that is no profile; names it.
    """
    for folder in (stored_path(KIND, "").parent, BUNDLED):
        found = list(_of_model(folder, model))
        if found:
            return min(found, key=lambda p: _distance(p.keep, keep))
    return None


def _of_model(folder: Path, model: str) -> Iterator[Profile]:
    if not folder.is_dir():
        return
    for path in sorted(folder.glob(f"{model}-*.json")):
        profile = Profile.load(path)
        if profile.model == model and profile.budget == "average" and _beats_random(profile):
            yield profile


def _beats_random(profile: Profile) -> bool:
    """A method that lost to `random` in what was measured is never picked."""
    measured = profile.measured
    return measured is None or measured.drift <= measured.controls.get("random", float("inf"))


def _distance(own: Keep, asked: Keep) -> tuple[bool, bool, float]:
    return (type(own) is not type(asked), own < asked, abs(own - asked))
