"""One forward's pruning: from the call's inputs to keep lists, and from keep lists to shorter tensors.

Everything the host has to know (where the images are, how many tokens each keeps) is settled before layer 0 from
one device-to-host copy; from then on only device tensors are touched.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenprune.arguments import KeepLists, is_list
from tokenprune.budget import Cut, Keep, plan_counts
from tokenprune.config import PruneConfig
from tokenprune.errors import BudgetError, ConfigError, TokenPruneError
from tokenprune.hashing import digest, mix
from tokenprune.methods.base import ImageTokens
from tokenprune.models.base import Family
from tokenprune.runtime.record import Columns
from tokenprune.runtime.vision import VisionFacts
from tokenprune.tokens import Image, IntArray, Selection

Key = tuple[int, int]  # (row, image)


class Pruning:
    """State of one forward that prunes.

    Attributes:
        rows: the images of each row.
        counts: counts[cut][(row, image)], tokens kept after the cut.
        length: columns of this forward's input.
        stages: after each cut carried out so far, the columns the sequence still holds.
        lengths: length of the sequence after each cut (host).
        last: the last visual column of any row.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        rows: list[list[Image]],
        config: PruneConfig,
        ids: IntArray,
        mask: NDArray[np.bool_] | None,
    ) -> None:
        """Plan a forward.

        Args:
            model, family: whose forward it is.
            rows: images by row.
            config: what to do.
            ids: (B, L) input_ids on the host.
            mask: (B, L) bool array, False at padding; None when there is none.
        """
        self.model, self.family = model, family
        # Forced lists say themselves what each image keeps.
        asked = config.arguments
        self.pooled = asked.allocation == "pooled" and asked.keep_lists is None
        rows = [pool(row) for row in rows] if self.pooled else rows
        self.rows, self.config = rows, config
        self.batch, self.length = ids.shape
        self.images: dict[Key, Image] = {
            (r, i): image for r, row in enumerate(rows) for i, image in enumerate(row)
        }
        self.last = max(int(image.columns[-1]) for image in self.images.values())
        self._mask = mask
        # Images whose last token ends their row: its state predicts the next token, so it stays whatever the method
        # says, which is not shown it.
        self.notes: dict[Key, list[Mapping[str, int | Tensor]]] = {}  # for the report
        self.ends_row = {
            key for key, image in self.images.items() if image.columns[-1] == self._row_end(key[0])
        }
        self.counts = self._plan(len(family.layers(model)))
        self.prunes = any(c[key] < image.n for c in self.counts for key, image in self.images.items())
        self._text = [self._text_columns(r) for r in range(self.batch)]
        self.lengths = [
            max(len(self._text[r]) + sum(c[r, i] for i in range(len(rows[r]))) for r in range(self.batch))
            for c in self.counts
        ]
        self.stages: list[Columns] = []
        self.selections: list[dict[Key, Selection]] = [{} for _ in config.cuts]
        self.kept: list[dict[Key, Tensor]] = []  # raster indices after each cut
        self.merged: list[dict[Key, tuple[Tensor, Tensor]]] = []
        self.prompts: dict[Key, Tensor] = {}
        self._columns: dict[Key, Tensor] = {}
        self._slots: dict[Key, Tensor] = {}
        self._text_device: list[Tensor] = []
        self.padding: Tensor | None = (
            None  # (B, L) bool on the device, False at padding; None where there is none
        )
        self.num_heads = 0

    # -- host ---------------------------------------------------------------------------------------------------

    def _plan(self, num_layers: int) -> list[dict[Key, int]]:
        config, asked = self.config, self.config.arguments
        if asked.keep_lists is not None:
            return check_keep_lists(asked.keep_lists, self.rows, self.ends_row)
        counts: list[dict[Key, int]] = [{} for _ in config.cuts]
        for key, image in self.images.items():
            own = len(image.parts) or 1  # a number of tokens is one per image
            self._note_small(key, image, asked.strict)
            cuts = tuple(Cut(cut.layer, _times(cut.keep, own)) for cut in config.cuts)
            planned = plan_counts(image.n, num_layers, cuts, _times(asked.keep, own), asked.budget)
            frames = sum(grid.frames for grid in image.grids)
            if asked.frame_floor and asked.frame_floor * frames > planned[-1] - (key in self.ends_row):
                raise BudgetError(
                    f"frame_floor={asked.frame_floor} takes {asked.frame_floor * frames} tokens for the {frames} "
                    f"frames of a {image.kind} that keeps {planned[-1]}; keep more, or lower the floor"
                )
            for c, k in enumerate(planned):
                counts[c][key] = k
        return counts

    def _note_small(self, key: Key, image: Image, strict: bool) -> None:
        """An image that has fewer tokens than are to be kept stays whole.

        Raises:
            BudgetError: `strict` does not allow that.
        """
        for asked in (self.config.arguments.keep, *(cut.keep for cut in self.config.cuts)):
            small = [part for part in image.parts or (image,) if isinstance(asked, int) and asked > part.n]
            if small and strict:
                raise BudgetError(
                    f"keep={asked} tokens, but the {image.kind} has only {small[0].n}; pass at most {small[0].n}, or a "
                    f"fraction"
                )
            if small:
                self.notes[key] = [{f"kept whole: fewer tokens than keep={asked}": len(small)}]
                return

    def _row_end(self, row: int) -> int:
        """A row's last column that is no padding."""
        if self._mask is None or not self._mask[row].any():
            return self.length - 1
        return int(np.flatnonzero(self._mask[row])[-1])

    def to_choose(self, cut: int, key: Key) -> int:
        """How many tokens of an image the method is asked for."""
        return self.counts[cut][key] - (key in self.ends_row)

    def _text_columns(self, row: int) -> IntArray:
        """Columns of a row that are never pruned. Left padding goes: a shorter batch needs less of it."""
        keep = np.ones(self.length, dtype=bool)
        for image in self.rows[row]:
            keep[image.columns] = False
        if self._mask is not None and self._mask[row].any():
            keep[: int(self._mask[row].argmax())] = False
        return np.flatnonzero(keep).astype(np.int64)

    # -- device -------------------------------------------------------------------------------------------------

    def to(self, device: torch.device) -> None:
        """Move the plan's constants to the device of the hidden states, in one copy."""
        parts = [*self._text, *(image.columns for image in self.images.values())]
        flat = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
        pieces = list(flat.split([len(p) for p in parts]))
        self._text_device = pieces[: self.batch]
        self._columns = dict(zip(self.images, pieces[self.batch :], strict=True))
        self._slots = dict(self._columns)
        if self.padding is not None:
            self.padding = self.padding.to(device)
        self.raster = {key: torch.arange(image.n, device=device) for key, image in self.images.items()}

    def slots(self, key: Key) -> Tensor:
        """(n,) places of an image's remaining tokens in the current sequence."""
        return self._slots[key]

    def take(self, states: Tensor, key: Key) -> Tensor:
        """An image's remaining tokens out of a (B | 1, L', ...) tensor: (n, ...)."""
        row = states[key[0] if states.shape[0] > 1 else 0]
        image = self.images[key]
        if not self.stages and image.columns[-1] - image.columns[0] + 1 == image.n:
            return row.narrow(0, int(image.columns[0]), image.n)  # a view: nothing is copied
        return row.index_select(0, self._slots[key].to(row.device))

    def view(self, key: Key, facts: Mapping[str, VisionFacts], /, **states: Tensor) -> ImageTokens:
        """What the method sees of an image at this cut: nothing that is the runtime's or the model's own.

        Args:
            key: (row, image).
            facts: what the vision tower's hook noted, by kind of image.
            states: (n, ...) of its remaining tokens, by name.
        """
        image, raster = self.images[key], self.raster[key].clone()
        if key in self.ends_row:
            raster, states = raster[:-1], {name: own[:-1] for name, own in states.items()}
        vision = digest = None
        noted = [(facts.get(part.kind), part) for part in image.parts or (image,)]
        if all(own is not None and own.attention for own, _ in noted):
            vision = torch.cat(
                [self._vision(own, part).to(raster.device) for own, part in noted if own is not None]
            )
            vision = vision if len(raster) == image.n else vision.index_select(0, raster)
        if all(own is not None and own.digests is not None for own, _ in noted):
            hashes = [_combined(own.digests[slice(*part.items)]) for own, part in noted if own is not None]  # type: ignore[index]
            digest = mix(
                _combined(torch.stack(hashes)).to(raster.device) + self.prompts[key].to(raster.device)
            )
        return ImageTokens(
            n=len(raster),
            raster=raster,
            grids=image.grids,
            num_heads=self.num_heads,
            vision=vision,
            digest=digest,
            frame_floor=self.config.arguments.frame_floor,
            **states,
        )

    def _vision(self, facts: VisionFacts, image: Image) -> Tensor:
        return self.family.to_tokens(self.model, torch.stack(facts.attention[slice(*image.items)]), image)

    def wants(self, cut: int) -> list[Key]:
        """Images that lose tokens at a cut and have no selection yet (all of those of a forced list are set)."""
        before = self.counts[cut - 1] if cut else {key: image.n for key, image in self.images.items()}
        return [k for k in self.images if self.counts[cut][k] < before[k] and k not in self.selections[cut]]

    def force(self, cut: int) -> None:
        """Turn the forced keep lists of a cut into selections."""
        forced = self.config.arguments.keep_lists
        assert forced is not None
        lists = forced[cut]
        for key in self.wants(cut):
            raster = self.raster[key]
            kept = torch.as_tensor(lists[key[0]][key[1]], dtype=torch.long).to(raster.device)
            self.selections[cut][key] = Selection(torch.searchsorted(raster, kept))

    def store(self, cut: int, key: Key, selection: Selection) -> None:
        """Keep what a method chose, on the plan's device: with several devices the scored layer's may be another."""
        if selection.merges is not None and self.images[key].parts:
            raise TokenPruneError(
                f"method {self.config.method.name!r} merges tokens, which allocation='pooled' does not offer; use "
                f"allocation='image'"
            )
        device = self.raster[key].device
        keep, merges, weights = (
            t if t is None else t.to(device) for t in (selection.keep, selection.merges, selection.weights)
        )
        assert keep is not None
        if key in self.ends_row:
            keep = torch.cat([keep, keep.new_full((1,), len(self.raster[key]) - 1)])
        self.selections[cut][key] = Selection(keep, merges, weights)
        self.notes.setdefault(key, []).append(selection.notes)

    def apply(self, cut: int, states: list[Tensor]) -> list[Tensor]:
        """Carry out a cut.

        Args:
            cut: its number.
            states: (B, L, D) states entering the cut's layer, and features (B, L, D) that later layers will add.

        Returns:
            The same, shortened to (B, L', D); filler takes the values of slot 0.
        """
        states = [self._merge(cut, x) for x in states]
        merged: dict[Key, tuple[Tensor, Tensor]] = {}
        for key in self.images:
            selection = self.selections[cut].get(key)
            if selection is None:
                continue
            if selection.merges is not None and selection.weights is not None:
                merged[key] = (self.raster[key][selection.merges], selection.weights)
            self.raster[key] = self.raster[key].index_select(0, selection.keep)
        self.kept.append(dict(self.raster))
        self.merged.append(merged)

        rows = []
        for r in range(self.batch):
            visual = [
                self._columns[r, i].index_select(0, self.raster[r, i]) for i in range(len(self.rows[r]))
            ]
            rows.append(torch.cat([self._text_device[r], *visual]))
        index = _right_align(rows, self.lengths[cut])
        visible = None
        if any(len(row) < self.lengths[cut] for row in rows) or self.padding is not None:
            visible = index >= 0
            if self.padding is not None:
                visible &= self.padding.gather(1, index.clamp(min=0))
        slots = index if not self.stages else torch.searchsorted(self.stages[-1].index, index)
        slots = slots.clamp(0, states[0].shape[1] - 1)
        self.stages.append(Columns(index, visible))
        for key in self.images:
            columns = self._columns[key].index_select(0, self.raster[key])
            self._slots[key] = torch.searchsorted(index[key[0]], columns)
        return [pick(x, slots) for x in states]

    def dropped(self, cut: int, device: torch.device) -> Tensor:
        """(B, L) long, 1 at visual columns that the selections of the first cut drop."""
        marks = torch.zeros(self.batch, self.length, dtype=torch.long, device=device)
        for key, selection in self.selections[cut].items():
            gone = torch.ones(len(self.raster[key]), dtype=torch.long, device=device).index_fill_(
                0, selection.keep, 0
            )
            marks[key[0]].index_copy_(0, self._slots[key], gone)
        return marks

    def _merge(self, cut: int, hidden: Tensor) -> Tensor:
        """Replace each merge's slot by the weighted sum of its sources; the caller's tensor stays as it is."""
        copied = False
        for key, selection in self.selections[cut].items():
            if selection.merges is None or selection.weights is None:
                continue
            if not copied:
                hidden, copied = hidden.clone(), True
            source, slot = selection.merges.to(hidden.device).unbind(1)
            states = self.take(hidden, key)
            weights = selection.weights.to(hidden.device, torch.float32)
            # Summed in float32 and rounded once.
            parts = states[source].float() * weights[:, None]
            total = parts.new_zeros(states.shape).index_add_(0, slot, parts).to(states.dtype)
            replaced = torch.zeros(len(states), dtype=torch.bool, device=hidden.device).index_fill_(
                0, slot, True
            )
            slots = self._slots[key].to(hidden.device)
            hidden[key[0]].index_copy_(0, slots, torch.where(replaced[:, None], total, states))
        return hidden


def pick(states: Tensor, slots: Tensor) -> Tensor:
    """states (B | 1, L, ...) at slots (B, L') -> (B, L', ...); a batch of 1 is shared by all rows."""
    slots = slots.to(states.device)
    batch, short = slots.shape
    rows, length = states.shape[:2]
    if rows == 1 and batch == 1:
        return states.index_select(1, slots[0])
    offset = torch.arange(batch, device=slots.device)[:, None] * length if rows > 1 else 0
    flat = states.reshape(rows * length, *states.shape[2:]).index_select(0, (slots + offset).reshape(-1))
    return flat.view(batch, short, *states.shape[2:])


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


def _combined(digests: Tensor) -> Tensor:
    """One hash of the hashes (m,) of the pictures an image consists of."""
    if len(digests) == 1:
        return digests[0]
    return mix(digests + torch.arange(len(digests), device=digests.device)).sum()


def _right_align(rows: Sequence[Tensor], length: int) -> Tensor:
    """Sort each row's columns and fill up with -1 on the left: (B, length)."""
    padded = [torch.nn.functional.pad(row, (length - len(row), 0), value=-1) for row in rows]
    return torch.stack(padded).sort(dim=1).values


def check_keep_lists(
    keep_lists: KeepLists, rows: list[list[Image]], ends_row: set[Key]
) -> list[dict[Key, int]]:
    """Counts of forced keep lists, checked against the call's images.

    Args:
        keep_lists: as `wrap` takes them.
        rows: images by row.
        ends_row: images whose last token has to stay.

    Raises:
        ConfigError: wrong shape, or indices that are not ascending, in range and a subset of the previous cut's, or
            an image that ends its row without its last token.
    """
    counts: list[dict[Key, int]] = []
    allowed: dict[Key, set[int]] = {
        (r, i): set(range(image.n)) for r, row in enumerate(rows) for i, image in enumerate(row)
    }
    for c, cut in enumerate(keep_lists):
        if _shape(cut) != [len(row) for row in rows]:
            raise ConfigError(
                f"keep_lists[{c}] must hold one list per image for each of the {len(rows)} rows "
                f"({', '.join(str(len(r)) for r in rows)} images)"
            )
        found: dict[Key, int] = {}
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


def prompt_digests(ids: Tensor, mask: NDArray[np.bool_] | None, rows: list[list[Image]]) -> dict[Key, Tensor]:
    """A hash per image of its row's ids up to the row's last image (left padding left out) and its place in it."""
    prompts: dict[Key, Tensor] = {}
    for r, row in enumerate(rows):
        if not row:
            continue
        end = max(int(image.columns[-1]) for image in row) + 1
        first = 0 if mask is None else int(mask[r].argmax())
        prompt = mix(digest(ids[r : r + 1, first:end])[0])
        for i in range(len(row)):
            prompts[r, i] = prompt + i
    return prompts
