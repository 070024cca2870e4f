"""Reading pairs from the command line."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.cli.shell import InputError


def parse_pairs(method: str, given: Sequence[str]) -> dict[str, str]:
    """`name=value` pairs, as they are.

    Raises:
        InputError: no `=`, or a name given twice.
    """
    pairs: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--param takes name=value, not {pair!r}; see 'tokenprune methods {method}'")
        if name in pairs:
            raise InputError(f"--param {name} is given twice; give it once")
        pairs[name] = value
    return pairs
