"""Original positions of pruned images, told from the encoder's rows.

An image's rows carry, beside the embedding, where in the image each one stands (on three axes), how many rows the image
has, and by how much it moves what follows: five numbers of two digits each, for half precision counts to 256 only.
vLLM's runner hands them to `recompute_mrope_positions` and takes the positions from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AXES = 3
_NUMBERS = AXES + 2
CHANNELS = 2 * _NUMBERS
_DIGIT = 128
LARGEST = _DIGIT**2 - 1  # number


def with_channels(rows: Tensor, places: Tensor, whole: int) -> Tensor:
    """Rows (k, D), where they stand (k, 3), and the positions their image takes unpruned: (k, D + CHANNELS)."""
    rest = places.new_tensor([len(places), whole]).expand(len(places), 2)
    numbers = torch.cat([places, rest], dim=1)
    digits = torch.stack([numbers // _DIGIT, numbers % _DIGIT], dim=2).flatten(1)
    return torch.cat([rows, digits.to(rows)], dim=1)


def without_channels(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows (k, D), where they stand (k, 3), how many rows their image has, and its positions: (k,) each."""
    digits = rows[:, -CHANNELS:].round().long().unflatten(1, (-1, 2))
    numbers = digits[..., 0] * _DIGIT + digits[..., 1]
    return rows[:, :-CHANNELS], numbers[:, :AXES], numbers[:, AXES], numbers[:, AXES + 1]


def expanded(tokens: Sequence[int], images: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    """The prompt as it were unpruned.

    Args:
        tokens: of the prompt, N of them.
        images: (offset, rows, tokens unpruned) of each image, in order.

    Returns:
        Its tokens, and where in them each of the N stands, of images the first ones.
    """
    out: list[int] = []
    columns: list[int] = []
    at = 0
    for offset, rows, whole in images:
        columns += range(len(out), len(out) + offset - at)
        out += tokens[at:offset]
        columns += range(len(out), len(out) + rows)
        out += [tokens[offset]] * whole
        at = offset + rows
    columns += range(len(out), len(out) + len(tokens) - at)
    return out + list(tokens[at:]), columns


def true_positions(
    is_image: Tensor, embeddings: Sequence[Tensor], positions: Tensor, computed: int
) -> tuple[list[Tensor], Tensor]:
    """Put the rows of this step's images at their own positions; where they are already, they stay.

    Args:
        is_image: (N,) bool, the prompt's tokens that stand for images.
        embeddings: of this step's images or parts of them, with channels, in order.
        positions: (3, N) as known so far.
        computed: tokens of the prompt that earlier steps have had.

    Returns:
        The embeddings without channels, and the positions.
    """
    columns = torch.arange(len(is_image), device=is_image.device)
    waiting, text = columns[is_image & (columns >= computed)], columns[~is_image]
    rows, positions, start = [], positions.clone(), 0
    for item in embeddings:
        own, places, count, whole = (part.to(is_image.device) for part in without_channels(item))
        rows.append(own.to(item.device))
        at = waiting[start : start + len(own)]
        start += len(own)
        # The run of placeholders an image stands in may be of several images of one size, side by side; others the
        # processor refuses.
        before = torch.searchsorted(text, at)  # text columns before each
        run = torch.where(before > 0, text[(before - 1).clamp(min=0)] + 1, torch.zeros_like(at))
        known = positions[0, (run - 1).clamp(min=0).to(positions.device)].to(at.device) + 1
        base = torch.where(run > 0, known, torch.zeros_like(at)) + (at - run) // count * whole
        positions[:, at.to(positions.device)] = (base[:, None] + places).T.to(positions)
    return rows, positions
