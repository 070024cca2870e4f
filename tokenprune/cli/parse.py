"""Reading values from the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from tokenprune.cli.shell import InputError

_COUNT = re.compile(r"[0-9]+")
_FRACTION = re.compile(r"[0-9]+\.[0-9]*|\.[0-9]+")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?%")
_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def parse_keep(text: str) -> float | int:
    """How much to keep: `25%` and `0.25` are fractions, `192` is a count, `1.0` is all and `1` one token.

    Raises:
        InputError: anything else.
    """
    text = text.strip()
    keep: float | int | None = None
    if _COUNT.fullmatch(text):
        keep = int(text)
        wrong = "that keeps nothing"
    elif _FRACTION.fullmatch(text):
        keep = float(text)
        wrong = (
            "that keeps nothing"
            if keep == 0
            else f"a fraction above 1; a number of tokens is written {int(keep)}"
        )
    elif match := _PERCENT.fullmatch(text):
        keep = float(match[1]) / 100
        wrong = "that keeps nothing" if keep == 0 else "more than all tokens"
    else:
        wrong = "that is none of them"
    if keep is None or keep <= 0 or (isinstance(keep, float) and keep > 1):
        raise InputError(
            f"--keep takes a fraction (25% or 0.25, at most 100%) or a number of tokens (192), not {text!r}: {wrong}"
        )
    return keep


def parse_layer(text: str) -> int | Literal["auto"]:
    """A decoder layer, or "auto".

    Raises:
        InputError: anything else.
    """
    if text == "auto":
        return "auto"
    if not _COUNT.fullmatch(text):
        raise InputError(
            f"--layer takes a decoder layer (a whole number) or auto, not {text!r}; see 'tokenprune run --help'"
        )
    return int(text)


def parse_parameters(method: str, given: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs as the method's keyword arguments, each of the type of that parameter's default.

    Raises:
        InputError: no `=`, a name given twice, or a value of another type.
    """
    from tokenprune.methods import METHODS

    defaults = {f.name: f.default for f in dataclasses.fields(METHODS[method])} if method in METHODS else {}
    parameters: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--param takes name=value, not {pair!r}; see 'tokenprune methods {method}'")
        if name in parameters:
            raise InputError(f"--param {name} is given twice; give it once")
        parameters[name] = _convert(name, value, defaults.get(name, ""))
    return parameters


def _convert(name: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in _BOOLEANS:
            raise InputError(f"--param {name} takes true or false, not {value!r}")
        return _BOOLEANS[value.lower()]
    if isinstance(default, int | float):
        try:
            return type(default)(value)
        except ValueError:
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise InputError(f"--param {name} takes {kind}, not {value!r}") from None
    return value
