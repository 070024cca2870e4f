"""Profiles known for a model: left in the user's cache by `tokenprune tune`, or bundled with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenprune.budget import Keep
from tokenprune.profiles.profile import Profile
from tokenprune.profiles.store import stored_path, write_document

KIND = "profiles"
BUNDLED = Path(__file__).with_name("bundled")


def remember_profile(profile: Profile) -> Path:
    """Keep a profile for its model and budget, in place of an older one.

    Raises:
        ConfigError: the cache folder cannot be written to.
    """
    path = stored_path(KIND, f"{profile.model}-{profile.keep}")
    write_document(profile.sealed(), path)
    return path


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
