"""What "auto" stands for on a model, and what profiles say: where they are resolved."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from tokenprune.arguments import AUTO, DEFAULT, Arguments
from tokenprune.budget import Cut
from tokenprune.errors import UnsupportedModelError, UntestedWarning
from tokenprune.models.base import Family
from tokenprune.models.decoders import attention_backend, takes_biases

# Reads no attention and drifts least of what does not, on both testbeds (docs/results.md).
_BLIND: dict[str, Any] = {"method": "uniform", "cuts": (Cut(0),)}


def resolve(family: Family, asked: Arguments, identify: Callable[[], str]) -> tuple[Arguments, str]:
    """What is asked with everything filled in that a profile, or "auto", stands for; and what the report says of it.

    Args:
        family: of the model.
        asked: by the user.
        identify: gives the model's fingerprint.

    Raises:
        ConfigError: a profile that does not go with what is asked beside it.
    """
    if asked.profile is not None:
        return asked.under(asked.profile), ""
    if asked.method != AUTO or asked.stages is not None:
        return asked, ""
    others = (asked.layer, asked.cuts, asked.keep_lists)
    if asked.keep is None or asked.parameters or any(one is not None for one in others):
        return dataclasses.replace(asked, method=DEFAULT), ""
    from tokenprune.profiles.known import known_profile  # pydantic is not needed otherwise

    profile = known_profile(identify(), asked.keep)
    if profile is not None:
        return asked.under(profile), f"; profile {profile.hash[:8]} for {profile.keep}"
    settled, what = _untested(family, asked)
    warnings.warn(
        f"no profile is known for this model: {what} is taken, untested on it; 'tokenprune tune MODEL --data pictures/ "
        f"--budget {asked.keep} --quick' chooses in a minute, 'tokenprune drift MODEL --data pictures/ --keep "
        f"{asked.keep}' shows what this one does",
        UntestedWarning,
        stacklevel=2,
    )
    return settled, "; untested on this model: see tokenprune tune and tokenprune drift"


def _untested(family: Family, asked: Arguments) -> tuple[Arguments, str]:
    """What is taken where nothing is known, and its name: what won on every model tried, if it can run here."""
    try:
        family.vision_tap()
    except UnsupportedModelError:
        what = f"an even grid (uniform, before the LLM), for nobody can look into the tower of {family.name} models,"
        return dataclasses.replace(asked, **_BLIND), what
    text: Any = family.text_model().config
    if takes_biases(text):
        return dataclasses.replace(asked, method=DEFAULT), "VFlowOpt with its defaults"
    what = f"VFlowOpt without its size term, which {attention_backend(text)} does not take,"
    return dataclasses.replace(asked, method=DEFAULT, parameters={"size_term": False}), what
