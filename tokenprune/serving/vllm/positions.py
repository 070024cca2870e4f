"""Original positions of pruned images, told from the encoder's rows.

An image's rows carry, beside the embedding, which of its tokens each one is, how many rows the image has, and how many
tokens it has unpruned: three numbers of two digits each, for half precision counts to 256 only. vLLM's runner hands
them to `recompute_mrope_positions` and takes the positions from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS = 6
_DIGIT = 128  # numbers up to 16,383


def with_channels(rows: Tensor, kept: Tensor, whole: int) -> Tensor:
    """Rows (k, D), which (k,) of the image's tokens they are, and how many it has: (k, D + CHANNELS)."""
    numbers = torch.stack([kept, torch.full_like(kept, len(kept)), torch.full_like(kept, whole)], dim=1)
    digits = torch.stack([numbers // _DIGIT, numbers % _DIGIT], dim=2).flatten(1)
    return torch.cat([rows, digits.to(rows)], dim=1)


def without_channels(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows (k, D), which tokens they are, how many rows their image has, and how many tokens: (k,) each."""
    digits = rows[:, -CHANNELS:].round().long().unflatten(1, (-1, 2))
    kept, count, whole = (digits[..., 0] * _DIGIT + digits[..., 1]).unbind(1)
    return rows[:, :-CHANNELS], kept, count, whole


def first_positions(tokens: Sequence[int], images: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Before anything is encoded: as if each image's first rows were kept.

    Args:
        tokens: of the prompt, N of them.
        images: (offset, rows, tokens unpruned) of each image, in order.

    Returns:
        (3, N) positions on three equal axes, and by how much the next position is ahead of the prompt's length.
    """
    step = torch.ones(len(tokens), dtype=torch.long)
    for offset, rows, whole in images:
        if offset + rows < len(tokens):
            step[offset + rows] += whole - rows  # what follows an image stands where it would without pruning
    positions = step.cumsum(0) - 1
    ahead = sum(whole - rows for _, rows, whole in images)
    return positions.expand(3, -1).clone(), ahead


def true_positions(
    tokens: Tensor, placeholder: int, embeddings: Sequence[Tensor], positions: Tensor, computed: int
) -> tuple[list[Tensor], Tensor]:
    """Put the rows of this step's images at their own positions.

    Args:
        tokens: (N,) of the prompt.
        placeholder: the id of images in it.
        embeddings: of this step's images or parts of them, with channels, in order.
        positions: (3, N) as known so far.
        computed: tokens of the prompt that earlier steps have had.

    Returns:
        The embeddings without channels, and the positions.
    """
    is_image = tokens == placeholder
    columns = torch.arange(len(tokens), device=tokens.device)
    waiting, text = columns[is_image & (columns >= computed)], columns[~is_image]
    rows, positions, start = [], positions.clone(), 0
    for item in embeddings:
        own, kept, count, whole = (part.to(tokens.device) for part in without_channels(item))
        rows.append(own.to(item.device))
        at = waiting[start : start + len(own)]
        start += len(own)
        # The run of placeholders an image stands in may be of several images of one size, side by side; others the
        # processor refuses.
        before = torch.searchsorted(text, at)  # text columns before each
        run = torch.where(before > 0, text[(before - 1).clamp(min=0)] + 1, torch.zeros_like(at))
        known = positions[0, (run - 1).clamp(min=0).to(positions.device)].to(at.device) + 1
        base = torch.where(run > 0, known, torch.zeros_like(at))
        place = base + (at - run) // count * whole + kept
        positions[:, at.to(positions.device)] = place.to(positions)
    return rows, positions
