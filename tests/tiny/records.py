"""Random pruning records: nested keep lists, and merges that go with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def random_cuts(
    positions: list[list[torch.Tensor]], layers: Sequence[int], keep: Sequence[float], seed: int = 0
) -> list[tuple[int, list[list[torch.Tensor]]]]:
    """Nested random keep lists: at `layers[i]` about `keep[i]` of each image's tokens (at least one) stay.

    Counts differ between images by one now and then, so that rows of a batch are ragged.
    """
    generator = torch.Generator().manual_seed(seed)
    current = [[torch.arange(len(image)) for image in row] for row in positions]
    cuts = []
    for layer, fraction in zip(layers, keep, strict=True):
        for row, images in enumerate(current):
            for image, kept in enumerate(images):
                extra = int(torch.randint(0, 2, (), generator=generator))
                count = max(1, int(fraction * len(positions[row][image])) + extra)
                order = torch.randperm(len(kept), generator=generator)[:count]
                current[row][image] = kept[order].sort().values
        cuts.append((layer, [list(images) for images in current]))
    return cuts


def random_merges(
    positions: list[list[torch.Tensor]], cuts: list[tuple[int, list[list[torch.Tensor]]]], seed: int = 0
) -> list[list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """For every cut, each dropped token goes to a random kept one; the slot weighs itself and its sources."""
    generator = torch.Generator().manual_seed(seed)
    before = [[torch.arange(len(image)) for image in row] for row in positions]
    merges = []
    for _, keep in cuts:
        rows = zip(before, keep, strict=True)
        merges.append([[_merge(a, b, generator) for a, b in zip(*row, strict=True)] for row in rows])
        before = keep
    return merges


def _merge(
    before: torch.Tensor, kept: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    dropped = before[~torch.isin(before, kept)]
    slots = kept[torch.randint(len(kept), (len(dropped),), generator=generator)]
    used = slots.unique()
    pairs = torch.cat([torch.stack([used, used], 1), torch.stack([dropped, slots], 1)])
    weights = torch.rand(len(pairs), generator=generator) + 0.1
    totals = torch.zeros(int(before.max()) + 1).index_add_(0, pairs[:, 1], weights)
    return pairs, weights / totals[pairs[:, 1]]
