"""The plan of a prompt's pruning: pure arithmetic on the host, settled before layer 0 and never changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokenprune.budget import Cut, Keep, average_kept, plan_counts, scaled_shares
from tokenprune.config import PruneConfig
from tokenprune.errors import BudgetError
from tokenprune.runtime.forced import check_keep_lists
from tokenprune.tokens import Image, IntArray

Key = tuple[int, int]  # (row, image)
SMALL = "kept another share than asked: too few tokens for it"
PRINT = "dense print: keeps text_floor"
AGAIN = "prefilled again with a larger budget: the first token was unsure"
LOW = "some frames keep fewer than frame_floor: too few tokens for it"


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

    def with_shares(self, told: Mapping[Key, Sequence[float]], num_layers: int) -> Plan:
        """The plan with a budget of its own for each image: its cuts' shares are scaled to it, the last solved anew.

        Args:
            told: by image, the share that its adaptive budget says, and how sure it is that it is print.
            num_layers: decoder layers.
        """
        asked = self.config.arguments
        counts: list[dict[Key, int]] = [{} for _ in self.counts]
        notes = dict(self.notes)
        for key, image in self.images.items():
            said, sure = told[key]
            assert isinstance(asked.keep, float)
            share = asked.keep if asked.adaptive_keep is None else asked.adaptive_keep.bounded(said)
            share = max(share, self.config.rows_at.get(key[0], 0.0))
            raised = asked.text_floor is not None and sure > 0.5 and share < asked.text_floor
            if raised and asked.text_floor is not None:
                share = asked.text_floor
            planned, missed = _counts(image, _at(self.config, share), num_layers, key in self.ends_row)
            for kept, k in zip(counts, planned, strict=True):
                kept[key] = k
            notes[key] = {**notes.get(key, {}), **missed, **({PRINT: 1} if raised else {})}
        return replace(self, counts=counts, notes=notes)

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
            again = config.rows_at.get(key[0])
            own = config if again is None else _at(config, again)
            planned, told = _counts(image, own, num_layers, key in ends_row)
            notes[key] |= told if again is None else {**told, AGAIN: 1}
            for kept, k in zip(counts, planned, strict=True):
                kept[key] = k
    text = [_text_columns(row, length, None if mask is None else mask[r]) for r, row in enumerate(rows)]
    return Plan(config, rows, length, counts, text, ends, ends_row, notes)


def _at(config: PruneConfig, share: float) -> PruneConfig:
    """What is asked, at another budget."""
    asked = config.arguments
    assert isinstance(asked.keep, float)
    cuts = config.cuts
    if len(cuts) > 1:
        scaled = scaled_shares([cut.keep for cut in cuts[:-1]], share, asked.keep)
        assert scaled is not None  # `Arguments` lets cuts say no numbers of tokens beside an adaptive budget
        cuts = (*(Cut(cut.layer, own) for cut, own in zip(cuts, scaled, strict=False)), Cut(cuts[-1].layer))
    return replace(
        config,
        arguments=replace(asked, keep=share, adaptive_keep=None, text_floor=None, strict=False),
        cuts=cuts,
    )


def _pools(config: PruneConfig) -> bool:
    # Forced lists say themselves what each image keeps.
    asked = config.arguments
    return asked.keep_lists is None and asked.allocation == "pooled"


def _keyed(rows: list[list[Image]]) -> dict[Key, Image]:
    return {(r, i): image for r, row in enumerate(rows) for i, image in enumerate(row)}


def _counts(
    image: Image, config: PruneConfig, num_layers: int, ends_row: bool
) -> tuple[list[int], dict[str, int]]:
    """Tokens an image keeps after each cut; and what is to be told of it where it has too few for the budget.

    Raises:
        BudgetError: a number of tokens below what the cuts can reach; with `strict` whatever cannot be met.
    """
    asked, own = config.arguments, len(image.parts) or 1  # a number of tokens is one per image
    cuts = tuple(Cut(cut.layer, _times(cut.keep, own)) for cut in config.cuts)
    keep, notes = _times(asked.keep, own), {}
    try:
        planned = plan_counts(image.n, num_layers, cuts, keep, asked.meaning)
    except BudgetError:
        if asked.strict:
            raise
        planned = plan_counts(image.n, num_layers, cuts, keep, asked.meaning, nearest=True)
        # A share a larger image could meet: `settle` has made sure of it. Of a number of tokens only this is known: an
        # image that keeps fewer than asked is too small for it, one that keeps more is not.
        counted = isinstance(keep, int) or any(isinstance(cut.keep, int) for cut in cuts)
        if counted and keep is not None and average_kept(image.n, num_layers, cuts, planned) > keep:
            raise
        notes[SMALL] = 1
    frames = sum(grid.frames for grid in image.grids)
    if asked.frame_floor and asked.frame_floor * frames > planned[-1] - ends_row:
        if asked.strict:
            raise BudgetError(
                f"frame_floor={asked.frame_floor} takes {asked.frame_floor * frames} tokens for the {frames} frames of "
                f"a {image.kind} that keeps {planned[-1]}; keep more, or lower the floor"
            )
        notes[LOW] = 1
    return planned, notes


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
