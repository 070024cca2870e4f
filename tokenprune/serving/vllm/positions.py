"""Original positions of pruned images, told from the encoder's rows.

An image's rows carry, beside the embedding, which of its tokens each one is and how many rows the image has: two
numbers of two digits each, for half precision counts to 256 only. vLLM's runner hands them to
`recompute_mrope_positions` and takes the positions from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS = 4
_DIGIT = 128


def with_channels(rows: Tensor, kept: Tensor) -> Tensor:
    """Rows (k, D) and the raster indices (k,) they are: (k, D + CHANNELS)."""
    count = torch.full_like(kept, len(kept))
    digits = [kept // _DIGIT, kept % _DIGIT, count // _DIGIT, count % _DIGIT]
    return torch.cat([rows, torch.stack(digits, dim=1).to(rows)], dim=1)


def without_channels(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, their raster indices, and how many rows their image has."""
    digits = rows[:, -CHANNELS:].round().long()
    return rows[:, :-CHANNELS], digits[:, 0] * _DIGIT + digits[:, 1], digits[:, 2] * _DIGIT + digits[:, 3]


def first_positions(
    tokens: Sequence[int], images: Sequence[tuple[int, int]], whole: int
) -> tuple[Tensor, int]:
    """Before anything is encoded: as if each image's first rows were kept.

    Args:
        tokens: of the prompt, N of them.
        images: (offset, rows) of each image, in order.
        whole: tokens of an unpruned image.

    Returns:
        (3, N) positions on three equal axes, and by how much the next position is ahead of the prompt's length.
    """
    step = torch.ones(len(tokens), dtype=torch.long)
    for offset, rows in images:
        if offset + rows < len(tokens):
            step[offset + rows] += whole - rows  # what follows an image stands where it would without pruning
    positions = step.cumsum(0) - 1
    ahead = sum(whole - rows for _, rows in images)
    return positions.expand(3, -1).clone(), ahead


def true_positions(
    tokens: Tensor,
    placeholder: int,
    embeddings: Sequence[Tensor],
    positions: Tensor,
    computed: int,
    whole: int,
) -> tuple[list[Tensor], Tensor]:
    """Put the rows of this step's images at their own positions.

    Args:
        tokens: (N,) of the prompt.
        placeholder: the id of images in it.
        embeddings: of this step's images or parts of them, with channels, in order.
        positions: (3, N) as known so far.
        computed: tokens of the prompt that earlier steps have had.
        whole: tokens of an unpruned image.

    Returns:
        The embeddings without channels, and the positions.
    """
    is_image = tokens == placeholder
    columns = torch.arange(len(tokens), device=tokens.device)
    waiting = columns[is_image & (columns >= computed)]
    rows, positions, start = [], positions.clone(), 0
    for item in embeddings:
        own, kept, count = without_channels(item)
        rows.append(own)
        at = waiting[start : start + len(own)]
        start += len(own)
        # The run of placeholders an image stands in may be of several images of one size, side by side.
        text = columns[~is_image]
        before = torch.searchsorted(text, at)  # text columns before each
        run = torch.where(before > 0, text[(before - 1).clamp(min=0)] + 1, torch.zeros_like(at))
        number = (at - run) // count.to(at.device)
        base = torch.where(
            run > 0, positions[0, (run - 1).clamp(min=0)].to(at.device) + 1, torch.zeros_like(at)
        )
        positions[:, at.to(positions.device)] = (base + number * whole + kept.to(at.device)).to(positions)
    return rows, positions
