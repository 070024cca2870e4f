"""Carrying out a plan: from what methods choose to shorter tensors. Only device tensors are touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.runtime.plan import Key, Plan
from tokenprune.runtime.record import Columns
from tokenprune.tokens import Selection, marked


class Stages:
    """What is left of a prompt, cut by cut.

    Args:
        plan: what is to be done.
        padding: (B, L) bool, False at padding; None where there is none.

    Attributes:
        done: after each cut carried out so far, the columns the sequence still holds.
        selections: by cut and image, what stays.
        raster: by image, (n,) raster indices of its remaining tokens.
        kept: after each cut, `raster` as it was.
        merged: at each cut, the merges by raster index.
        sizes: by image, (n,) how many original tokens each remaining one stands for; none where nothing was merged.
        biases: by image, (n,) float32 what is added to the attention logits of each; none where nothing is.
        biased: at each cut, the biases given there: raster indices and values.
        notes: by image, what is to be told of it, by the plan and by the method.
    """

    def __init__(self, plan: Plan, padding: Tensor | None) -> None:
        self.plan, self.padding = plan, padding
        self.images = plan.images
        self.done: list[Columns] = []
        self.selections: list[dict[Key, Selection]] = [{} for _ in plan.counts]
        self.kept: list[dict[Key, Tensor]] = []
        self.merged: list[dict[Key, tuple[Tensor, Tensor]]] = []
        self.notes: dict[Key, list[Mapping[str, int | Tensor]]] = {k: [own] for k, own in plan.notes.items()}
        self.raster: dict[Key, Tensor] = {}
        self.sizes: dict[Key, Tensor] = {}
        self.biases: dict[Key, Tensor] = {}
        self.biased: list[dict[Key, tuple[Tensor, Tensor]]] = []
        self._columns: dict[Key, Tensor] = {}
        self._slots: dict[Key, Tensor] = {}
        self._text: list[Tensor] = []

    def to(self, device: torch.device) -> None:
        """Move the plan's constants to the device of the hidden states, in one copy."""
        parts = [*self.plan.text, *(image.columns for image in self.images.values())]
        flat = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
        pieces = list(flat.split([len(p) for p in parts]))
        self._text = pieces[: self.plan.batch]
        self._columns = dict(zip(self.images, pieces[self.plan.batch :], strict=True))
        self._slots = dict(self._columns)
        if self.padding is not None:
            self.padding = self.padding.to(device)
        self.raster = {key: torch.arange(image.n, device=device) for key, image in self.images.items()}

    def slots(self, key: Key) -> Tensor:
        """(n,) places of an image's remaining tokens in the current sequence."""
        return self._slots[key]

    def shown(self, key: Key) -> int:
        """How many of an image's remaining tokens the method is shown."""
        return len(self.raster[key]) - (key in self.plan.ends_row)

    def column_of(self, key: Key) -> Tensor:
        """(n,) columns of the prompt an image's remaining tokens came from."""
        return self._columns[key].index_select(0, self.raster[key])

    def take(self, states: Tensor, key: Key) -> Tensor:
        """An image's remaining tokens out of a (B | 1, L', ...) tensor: (n, ...)."""
        row = states[key[0] if states.shape[0] > 1 else 0]
        image = self.images[key]
        if not self.done and image.columns[-1] - image.columns[0] + 1 == image.n:
            return row.narrow(0, int(image.columns[0]), image.n)  # a view: nothing is copied
        return row.index_select(0, self._slots[key].to(row.device))

    def missing(self, cut: int) -> list[Key]:
        """Images that lose tokens at a cut and have no selection yet."""
        return [key for key in self.plan.losing(cut) if key not in self.selections[cut]]

    def force(self, cut: int) -> None:
        """Turn the forced keep lists of a cut into selections."""
        forced = self.plan.config.arguments.keep_lists
        assert forced is not None
        lists = forced[cut]
        for key in self.missing(cut):
            raster = self.raster[key]
            kept = torch.as_tensor(lists[key[0]][key[1]], dtype=torch.long).to(raster.device)
            self.selections[cut][key] = Selection(torch.searchsorted(raster, kept))

    def store(self, cut: int, key: Key, selection: Selection) -> None:
        """Keep what a method chose, on the plan's device: with several devices the scored layer's may be another."""
        if selection.merges is not None and self.images[key].parts:
            raise TokenPruneError(
                f"method {self.plan.config.method.name!r} merges tokens, which allocation='pooled' does not offer; use "
                f"allocation='image'"
            )
        device = self.raster[key].device
        given = (selection.keep, selection.merges, selection.weights, selection.bias)
        keep, merges, weights, bias = (t if t is None else t.to(device) for t in given)
        assert keep is not None
        if key in self.plan.ends_row:
            keep = torch.cat([keep, keep.new_full((1,), len(self.raster[key]) - 1)])
            bias = None if bias is None else torch.cat([bias, bias.new_zeros(1)])
        self.selections[cut][key] = Selection(keep, merges, weights, bias)
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
        self.merged.append({})
        self.biased.append({})
        for key, selection in self.selections[cut].items():
            self._cut_image(key, selection)
        self.kept.append(dict(self.raster))

        rows, lengths = [], self.plan.lengths
        for r in range(self.plan.batch):
            visual = [
                self._columns[r, i].index_select(0, self.raster[r, i]) for i in range(len(self.plan.rows[r]))
            ]
            rows.append(torch.cat([self._text[r], *visual]))
        index = _right_align(rows, lengths[cut])
        visible = None
        if any(len(row) < lengths[cut] for row in rows) or self.padding is not None:
            visible = index >= 0
            if self.padding is not None:
                visible &= self.padding.gather(1, index.clamp(min=0))
        slots = index if not self.done else torch.searchsorted(self.done[-1].index, index)
        slots = slots.clamp(0, states[0].shape[1] - 1)
        for key in self.images:
            columns = self._columns[key].index_select(0, self.raster[key])
            self._slots[key] = torch.searchsorted(index[key[0]], columns)
        bias = None
        if self.biases:
            bias = torch.zeros(index.shape, device=index.device)
            for key, own in self.biases.items():
                bias[key[0]].index_copy_(0, self._slots[key], own)
        self.done.append(Columns(index, visible, bias))
        return [pick(x, slots) for x in states]

    def _cut_image(self, key: Key, selection: Selection) -> None:
        raster, sizes = self.raster[key], self.sizes.get(key)
        if selection.merges is not None and selection.weights is not None:
            self.merged[-1][key] = (raster[selection.merges], selection.weights)
            source, slot = selection.merges.unbind(1)
            before = torch.ones(len(raster), device=raster.device) if sizes is None else sizes
            # What goes into several stands in equal parts for them; how much of it each has is the method's.
            times = torch.zeros_like(before).index_add_(0, source, torch.ones_like(before[source]))
            total = torch.zeros_like(before).index_add_(0, slot, (before / times.clamp(min=1))[source])
            sizes = torch.where(marked(slot, len(raster)), total, before)
        self.raster[key] = raster.index_select(0, selection.keep)
        if sizes is not None:
            self.sizes[key] = sizes.index_select(0, selection.keep)
        if selection.bias is not None:
            self.biases[key] = selection.bias.float()
            self.biased[-1][key] = (self.raster[key], self.biases[key])
        elif key in self.biases:
            self.biases[key] = self.biases[key].index_select(0, selection.keep)

    def text_slots(self, columns: Tensor, row: int) -> Tensor:
        """Where columns of a row that were not pruned stand in the current sequence."""
        return torch.searchsorted(self.done[-1].index[row], columns) if self.done else columns

    def dropped(self, cut: int, device: torch.device) -> Tensor:
        """(B, L) long, 1 at visual columns that the selections of the first cut drop."""
        marks = torch.zeros(self.plan.batch, self.plan.length, dtype=torch.long, device=device)
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
            if selection.merges is None:
                continue
            if not copied:
                hidden, copied = hidden.clone(), True
            slots = self._slots[key].to(hidden.device)
            hidden[key[0]].index_copy_(0, slots, selection.merged(self.take(hidden, key)))
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


def pick_positions(ids: Tensor, slots: Tensor) -> Tensor:
    """Position ids (B | 1, L), or of several axes (axes, B | 1, L), at slots (B, L')."""
    return pick(ids, slots) if ids.ndim == 2 else torch.stack([pick(axis, slots) for axis in ids])


def _right_align(rows: Sequence[Tensor], length: int) -> Tensor:
    """Sort each row's columns and fill up with -1 on the left: (B, length)."""
    padded = [torch.nn.functional.pad(row, (length - len(row), 0), value=-1) for row in rows]
    return torch.stack(padded).sort(dim=1).values
