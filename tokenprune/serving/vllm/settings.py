"""What a server is asked to keep, checked: a method that sees no text, cut once, before the LLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenprune.arguments import AUTO, Arguments
from tokenprune.budget import Keep, check_keep
from tokenprune.errors import ConfigError
from tokenprune.methods import Method, make_method

PER_REQUEST = "tokenprune_keep"  # in mm_processor_kwargs


@dataclass(frozen=True)
class Settings:
    """Attributes:
    method: what chooses.
    keep: share of an image's tokens, or how many.
    """

    method: Method
    keep: Keep

    def count(self, tokens: int, keep: Keep | None = None) -> int:
        """How many of an image's tokens stay; rounded down, at least one."""
        own = self.keep if keep is None else keep
        return min(tokens, own) if isinstance(own, int) else max(1, int(own * tokens))

    def to_dict(self) -> dict[str, Any]:
        """What `read_settings` takes, for a model's config that travels between processes."""
        parameters = {f.name: getattr(self.method, f.name) for f in dataclasses.fields(self.method)}
        return {"method": self.method.name, "keep": self.keep, **parameters}


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from what stands in vLLM's additional config.

    Args:
        given: arguments of `wrap`: "method" and "keep", or "profile" (a path), and the method's parameters. A profile's
            several cuts become one before the LLM, of the profile's budget.

    Raises:
        ConfigError: no such method, parameter or budget, or one that cannot be served; says which.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f'the setting "tokenprune" must be an object such as {{"method": "uniform", "keep": 0.25}}, not {given!r}'
        )
    asked = Arguments.of(dict(given))
    if asked.profile is not None:
        asked = asked.under(asked.profile)
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
    needs = method.needs()
    seen = {
        "states of the decoder": bool(needs.states) and needs.ahead is None,
        "the prompt's text": bool(needs.prompt or needs.words or needs.last_row),
        "all images at once": needs.row,
        "a say in the counts": needs.counts,
    }
    if wanted := [what for what, wants in seen.items() if wants]:
        raise ConfigError(
            f"method {method.name!r} needs {' and '.join(wanted)}, which are not there before the LLM inside vLLM; "
            f"serve vflowopt, importance, uniform, random, or entropyprune with lookahead"
        )
    return Settings(method, check_keep(asked.keep))


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
