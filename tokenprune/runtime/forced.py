"""Keep lists that the user forces instead of a method's choice."""

from __future__ import annotations

import operator
from collections.abc import Set
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from tokenprune.arguments import KeepLists, is_list
from tokenprune.errors import ConfigError
from tokenprune.tokens import Image


def check_keep_lists(
    keep_lists: KeepLists, rows: list[list[Image]], ends_row: Set[tuple[int, int]]
) -> list[dict[tuple[int, int], int]]:
    """Counts of forced keep lists, checked against the call's images.

    Args:
        keep_lists: as `wrap` takes them.
        rows: images by row.
        ends_row: images whose last token has to stay.

    Raises:
        ConfigError: wrong shape, or indices that are not ascending, in range and a subset of the previous cut's, or
            an image that ends its row without its last token.
    """
    counts: list[dict[tuple[int, int], int]] = []
    allowed: dict[tuple[int, int], set[int]] = {
        (r, i): set(range(image.n)) for r, row in enumerate(rows) for i, image in enumerate(row)
    }
    for c, cut in enumerate(keep_lists):
        if _shape(cut) != [len(row) for row in rows]:
            raise ConfigError(
                f"keep_lists[{c}] must hold one list per image for each of the {len(rows)} rows "
                f"({', '.join(str(len(r)) for r in rows)} images)"
            )
        found: dict[tuple[int, int], int] = {}
        for key, before in allowed.items():
            kept = _indices(cut[key[0]][key[1]])
            if not kept or any(b <= a for a, b in pairwise(kept)) or not before.issuperset(kept):
                raise ConfigError(
                    f"keep_lists[{c}][{key[0]}][{key[1]}] must be a list of ints, ascending, non-empty and drawn "
                    f"from the {len(before)} tokens left of that image"
                )
            if key in ends_row and kept[-1] != rows[key[0]][key[1]].n - 1:
                raise ConfigError(
                    f"keep_lists[{c}][{key[0]}][{key[1]}] must keep the image's last token, "
                    f"{rows[key[0]][key[1]].n - 1}: the row ends in it, and its state predicts the next token"
                )
            allowed[key], found[key] = set(kept), len(kept)
        counts.append(found)
    return counts


def _shape(cut: Any) -> list[int] | None:
    """Lists per row, or None where they are not nested as they should be."""
    if not is_list(cut) or not all(is_list(row) for row in cut):
        return None
    return [len(row) for row in cut]


def _indices(given: Any) -> list[int]:
    """A list (or tensor, or array) of integers as ints; empty where it is anything else."""
    given = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if not is_list(given) or any(isinstance(x, bool | np.bool_) for x in given):
        return []
    try:
        return [operator.index(x) for x in given]
    except TypeError:
        return []
