"""What a server is asked to keep, checked: a method that sees no text, cut once, before the LLM."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenprune.arguments import AUTO, Arguments
from tokenprune.budget import Keep, check_keep
from tokenprune.errors import ConfigError
from tokenprune.methods import Method, make_method
from tokenprune.serving.vllm.names import PER_REQUEST

BOUNDS = ("keep_min", "keep_max")  # of what a request may ask for


@dataclass(frozen=True)
class Settings:
    """Attributes:
    method: what chooses.
    keep: share of an image's tokens, or how many.
    keep_min, keep_max: what a request may ask for at least and at most, in the same units; None: anything.
    """

    method: Method
    keep: Keep
    keep_min: Keep | None = None
    keep_max: Keep | None = None

    def count(self, tokens: int, asked: Keep | None = None) -> int:
        """How many of an image's tokens stay; rounded down, at least one.

        Args:
            tokens: that the image has.
            asked: by the request; None: the server's own.

        Raises:
            ValueError: the request asks for fewer or more than it may.
        """
        if asked is None:
            return _count(tokens, self.keep)
        kept = _count(tokens, asked)
        if self.keep_min is not None and kept < _count(tokens, self.keep_min):
            raise ValueError(f"{PER_REQUEST}={asked}: this server keeps at least keep_min={self.keep_min}")
        if self.keep_max is not None and kept > _count(tokens, self.keep_max):
            raise ValueError(f"{PER_REQUEST}={asked}: this server keeps at most keep_max={self.keep_max}")
        return kept

    def to_dict(self) -> dict[str, Any]:
        """What `read_settings` takes, for a model's config that travels between processes."""
        parameters = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}
        bounds = {name: getattr(self, name) for name in BOUNDS if getattr(self, name) is not None}
        return {"method": self.method.name, "keep": self.keep, **bounds, **parameters}

    @property
    def mark(self) -> str:
        """Short, and another one for other settings."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def _count(tokens: int, keep: Keep) -> int:
    return min(tokens, keep) if isinstance(keep, int) else max(1, int(keep * tokens))


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from what stands in vLLM's additional config.

    Args:
        given: arguments of `wrap`: "method" and "keep", or "profile" (a path), and the method's parameters; and the
            bounds "keep_min" and "keep_max". A profile's several cuts become one before the LLM, of the profile's
            budget.

    Raises:
        ConfigError: no such method, parameter or budget, or one that cannot be served; says which.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f'the setting "tokenprune" must be an object such as {{"method": "uniform", "keep": 0.25}}, not {given!r}'
        )
    own = dict(given)
    bounds = {name: check_keep(own.pop(name)) for name in BOUNDS if own.get(name) is not None}
    asked = Arguments.of(own)
    if asked.profile is not None:
        asked = asked.under(asked.profile)
    if asked.stages is not None:
        raise ConfigError("vLLM can cut before the LLM only, by one method: leave stages out")
    if asked.method == AUTO:
        raise ConfigError('say which method is served, for example "method": "vflowopt", or give a "profile"')
    if asked.keep is None:
        raise ConfigError('say how much is kept: "keep": 0.25 (a share) or 144 (tokens per image)')
    _refuse(asked)
    parameters = dict(asked.parameters)
    method = make_method(asked.method, parameters)
    if getattr(method, "size_term", False):  # a bias on attention, which vLLM's kernels do not take
        if "size_term" in given:
            raise ConfigError(
                "size_term=True adds biases to attention, which vLLM does not take; leave it out"
            )
        method = dataclasses.replace(method, size_term=False)  # type: ignore[call-arg]
    if wanted := method.needs().not_ahead:
        raise ConfigError(
            f"method {method.name!r} needs {' and '.join(wanted)}, which are not there before the LLM inside vLLM; "
            f"serve vflowopt, importance, uniform, random, or entropyprune with lookahead"
        )
    return _checked(Settings(method, check_keep(asked.keep), **bounds))


def _checked(settings: Settings) -> Settings:
    """The server's own budget within its bounds, where they are in the same unit."""
    low, keep, high = settings.keep_min, settings.keep, settings.keep_max
    for smaller, larger in ((low, keep), (keep, high), (low, high)):
        if smaller is not None and type(smaller) is type(larger) and smaller > larger:
            raise ConfigError(f"keep_min={low}, keep={keep} and keep_max={high} have to be in this order")
    return settings


def _refuse(asked: Arguments) -> None:
    """What `wrap` takes and a server does not."""
    if asked.layer not in (None, 0):
        raise ConfigError(f"vLLM can cut before the LLM only: leave layer={asked.layer!r} out")
    if asked.cuts is not None and asked.profile is None:
        raise ConfigError("vLLM can cut before the LLM only: leave cuts out")
    if (
        asked.positions != "keep"
        or asked.allocation != "image"
        or asked.frame_floor
        or asked.keep_lists is not None
        or asked.compact_early
    ):
        raise ConfigError(
            "positions, allocation, frame_floor, keep_lists and compact_early are not served in vLLM; leave them out"
        )
