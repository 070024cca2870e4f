"""Which releases of transformers are supported, and what is named differently in them: the one place that knows."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor

from tokenprune.errors import UnsupportedModelError, UntestedWarning

OLDEST, NEWEST = (5, 17), (5, 24)  # bounds of pyproject.toml; the tests run on both
_CACHE = ("cache", "past_key_values")  # the name since 5.24, and the one before it


def release() -> str:
    """The one installed, for messages."""
    return f"transformers {transformers.__version__}"


def check_release() -> None:
    """Refuse a release that is too old; of one that nobody here has run, warn.

    Raises:
        UnsupportedModelError: says what to install.
    """
    version = transformers.__version__
    number = major_minor(version)
    if number < OLDEST:
        raise UnsupportedModelError(
            f"transformers {version} is too old: pip install 'transformers>={_text(OLDEST)},<={_text(NEWEST)}.*'"
        )
    if number > NEWEST:
        warnings.warn(
            f"transformers {version} is newer than tested ({_text(OLDEST)} to {_text(NEWEST)}): what pruning relies on "
            f"is checked at the first calls; to be sure, pip install 'transformers=={_text(NEWEST)}.*'",
            UntestedWarning,
            stacklevel=3,
        )


def major_minor(version: str) -> tuple[int, int]:
    """ "5.24.0" -> (5, 24); what is no version is older than any."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


def _text(number: tuple[int, int]) -> str:
    return ".".join(map(str, number))


def cache_of(named: Mapping[str, Any], default: Any = None) -> Any:
    """The cache among the named inputs, or the named outputs, of a model, a text model or a layer."""
    for name in _CACHE:  # in every layer of every step: no generator
        if named.get(name) is not None:
            return named[name]
    return default


def frames_per_video(inputs: Mapping[str, Any], places: Tensor) -> Tensor:
    """(videos,) how many frames each has: said since 5.24, where frames of all stand in a row; before, by shape."""
    given = inputs.get("num_frames_per_video")
    if given is None:
        return places.new_full(places.shape[:1], places.shape[1])
    return torch.as_tensor(given, device=places.device)


def cache_argument(module: Any) -> str:
    """The name under which a module takes a cache."""
    kind: Any = type(module)
    return _cache_argument(kind)


@lru_cache
def _cache_argument(kind: Any) -> str:
    parameters: Mapping[str, Any] = inspect.signature(kind.forward).parameters
    return next((name for name in _CACHE if name in parameters), _CACHE[-1])


def checkpoints_forwards() -> bool:
    """Whether gradient checkpointing repeats a layer's forward without its hooks (not in 5.17, in 5.23 and later)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" not in vars(GradientCheckpointingLayer)


def repeats_hooks(model: torch.nn.Module) -> bool:
    """Whether gradient checkpointing is on, and repeats hooks."""
    on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return on and not checkpoints_forwards()


def names_cache(named: Mapping[str, Any]) -> bool:
    """Whether a cache, be it None, is among the named inputs."""
    return any(name in named for name in _CACHE)
