"""The plan of a prompt's pruning: pure arithmetic on the host, settled before layer 0 and never changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokenprune.budget import Cut, Keep, plan_counts
from tokenprune.config import PruneConfig
from tokenprune.errors import BudgetError
from tokenprune.runtime.forced import check_keep_lists
from tokenprune.tokens import Image, IntArray

Key = tuple[int, int]  # (row, image)
SMALL = "kept another share than asked: too few tokens for it"


@dataclass(frozen=True)
class Plan:
    """Attributes:
    config: what is asked.
    rows: images of each row; with `allocation="pooled"` one per row.
    length: columns of the input.
    counts: counts[cut][(row, image)], tokens kept after the cut.
    text: columns of each row that are never pruned.
    ends: each row's last column that is no padding.
    ends_row: images whose last token is its row's last column: its state predicts the next token, so it stays whatever
        the method says, which is not shown it.
    notes: by image, what is to be told of it.
    """

    config: PruneConfig
    rows: list[list[Image]]
    length: int
    counts: list[dict[Key, int]]
    text: list[IntArray]
    ends: list[int]
    ends_row: frozenset[Key]
    notes: Mapping[Key, Mapping[str, int]]

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def pooled(self) -> bool:
        return _pools(self.config)

    @property
    def images(self) -> dict[Key, Image]:
        return _keyed(self.rows)

    @property
    def last(self) -> int:
        """The last visual column of any row."""
        return max(int(image.columns[-1]) for row in self.rows for image in row)

    @property
    def prunes(self) -> bool:
        """Whether any token is dropped."""
        return any(kept[key] < image.n for kept in self.counts for key, image in self.images.items())

    @cached_property
    def lengths(self) -> list[int]:
        """Length of the sequence after each cut."""
        return [
            max(
                len(own) + sum(kept[r, i] for i in range(len(self.rows[r])))
                for r, own in enumerate(self.text)
            )
            for kept in self.counts
        ]

    def to_choose(self, cut: int, key: Key) -> int:
        """How many tokens of an image the method is asked for."""
        return self.counts[cut][key] - (key in self.ends_row)

    def prompt(self, row: int) -> IntArray:
        """A row's text without padding."""
        return self.text[row][self.text[row] <= self.ends[row]]

    def with_counts(self, told: Mapping[Key, Sequence[int]]) -> Plan:
        """The plan with what a method says of each image, kept within 1 and n, and from growing."""
        counts: list[dict[Key, int]] = [{} for _ in self.counts]
        for key, image in self.images.items():
            most = image.n
            for cut, wanted in zip(counts, told[key], strict=True):
                most = cut[key] = max(1, min(most, wanted))
        return replace(self, counts=counts)

    def losing(self, cut: int) -> list[Key]:
        """Images that lose tokens at a cut."""
        images = self.images
        before = self.counts[cut - 1] if cut else {key: image.n for key, image in images.items()}
        return [key for key in images if self.counts[cut][key] < before[key]]


def make_plan(
    rows: list[list[Image]], config: PruneConfig, length: int, mask: NDArray[np.bool_] | None, num_layers: int
) -> Plan:
    """Plan a prompt.

    Args:
        rows: images by row.
        config: what to do.
        length: columns of the input.
        mask: (B, L) bool array, False at padding; None when there is none.
        num_layers: decoder layers.

    Raises:
        ConfigError: forced lists that do not fit the images.
        BudgetError: a budget that they cannot meet.
    """
    rows = [pool(row) for row in rows] if _pools(config) else rows
    images = _keyed(rows)
    ends = [_row_end(mask, r, length) for r in range(len(rows))]
    ends_row = frozenset(key for key, image in images.items() if image.columns[-1] == ends[key[0]])
    lists = config.arguments.keep_lists
    notes: dict[Key, dict[str, int]] = {}
    if lists is not None:
        counts = check_keep_lists(lists, rows, ends_row)
    else:
        counts = [{} for _ in config.cuts]
        for key, image in images.items():
            notes[key] = _note_small(image, config)
            planned, missed = _counts(image, config, num_layers, key in ends_row)
            if missed:
                notes[key][SMALL] = 1
            for kept, k in zip(counts, planned, strict=True):
                kept[key] = k
    text = [_text_columns(row, length, None if mask is None else mask[r]) for r, row in enumerate(rows)]
    return Plan(config, rows, length, counts, text, ends, ends_row, notes)


def _pools(config: PruneConfig) -> bool:
    # Forced lists say themselves what each image keeps.
    asked = config.arguments
    return asked.keep_lists is None and asked.allocation == "pooled"


def _keyed(rows: list[list[Image]]) -> dict[Key, Image]:
    return {(r, i): image for r, row in enumerate(rows) for i, image in enumerate(row)}


def _counts(image: Image, config: PruneConfig, num_layers: int, ends_row: bool) -> tuple[list[int], bool]:
    """Tokens an image keeps after each cut; and whether it has too few for what the budget says.

    Raises:
        BudgetError: a number of tokens that cannot be met; a share, too, where `strict` wants it met.
    """
    asked, own = config.arguments, len(image.parts) or 1  # a number of tokens is one per image
    cuts = tuple(Cut(cut.layer, _times(cut.keep, own)) for cut in config.cuts)
    keep, missed = _times(asked.keep, own), False
    try:
        planned = plan_counts(image.n, num_layers, cuts, keep, asked.meaning)
    except BudgetError:
        # A larger image could: `settle` has made sure of it.
        if asked.strict or isinstance(keep, int) or any(isinstance(cut.keep, int) for cut in cuts):
            raise
        planned, missed = plan_counts(image.n, num_layers, cuts, keep, asked.meaning, nearest=True), True
    frames = sum(grid.frames for grid in image.grids)
    if asked.frame_floor and asked.frame_floor * frames > planned[-1] - ends_row:
        raise BudgetError(
            f"frame_floor={asked.frame_floor} takes {asked.frame_floor * frames} tokens for the {frames} frames of a "
            f"{image.kind} that keeps {planned[-1]}; keep more, or lower the floor"
        )
    return planned, missed


def _note_small(image: Image, config: PruneConfig) -> dict[str, int]:
    """An image that has fewer tokens than are to be kept stays whole.

    Raises:
        BudgetError: `strict` does not allow that.
    """
    for asked in (config.arguments.keep, *(cut.keep for cut in config.cuts)):
        small = [part for part in image.parts or (image,) if isinstance(asked, int) and asked > part.n]
        if small and config.arguments.strict:
            raise BudgetError(
                f"keep={asked} tokens, but the {image.kind} has only {small[0].n}; pass at most {small[0].n}, or a "
                f"fraction"
            )
        if small:
            return {f"kept whole: fewer tokens than keep={asked}": len(small)}
    return {}


def _row_end(mask: NDArray[np.bool_] | None, row: int, length: int) -> int:
    """A row's last column that is no padding."""
    if mask is None or not mask[row].any():
        return length - 1
    return int(np.flatnonzero(mask[row])[-1])


def _text_columns(images: list[Image], length: int, real: NDArray[np.bool_] | None) -> IntArray:
    """Columns of a row that are never pruned. Left padding goes: a shorter batch needs less of it."""
    keep = np.ones(length, dtype=bool)
    for image in images:
        keep[image.columns] = False
    if real is not None and real.any():
        keep[: int(real.argmax())] = False
    return np.flatnonzero(keep).astype(np.int64)


def pool(row: list[Image]) -> list[Image]:
    """The images of a row as one, which keeps its columns in order."""
    if len(row) < 2:
        return row
    columns = np.concatenate([image.columns for image in row])
    grids = tuple(grid for image in row for grid in image.grids)
    structural = sum(image.structural for image in row)
    return [Image(columns, grids, row[0].kind, row[0].order, row[0].items, structural, tuple(row))]


def unpool(kept: Sequence[int], row: Sequence[Image]) -> list[list[int]]:
    """Raster indices of a pooled image -> those of each of the row's images."""
    lists, start = [], 0
    for image in row:
        lists.append([index - start for index in kept if start <= index < start + image.n])
        start += image.n
    return lists


def _times(keep: Keep | None, images: int) -> Keep | None:
    return keep * images if isinstance(keep, int) else keep
