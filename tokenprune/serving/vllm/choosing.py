"""A method's choice for one image inside the encoder, with the library's own methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenprune.hashing import digest
from tokenprune.methods import ImageTokens, Method
from tokenprune.tokens import Grid, VisionAttention


def choose_rows(
    method: Method,
    features: Tensor,
    k: int,
    grid: Grid,
    attention: VisionAttention | None,
    patches: Tensor | None,
    ahead: Callable[[], dict[str, Any]] | None = None,
    num_heads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Keep `k` of an image's features.

    Args:
        method: see `read_settings`.
        features: (n, D) as the projector puts them out.
        k: how many.
        grid: their layout.
        attention: of the vision tower; None where the method does not ask for it.
        patches: (n, 3, h, w) 8-bit pixels; likewise.
        ahead: computes the states of the decoder that the method looks ahead for.
        num_heads: of the decoder.

    Returns:
        (k, D) features, merged where the method merges, and (k,) the raster indices they are of.
    """
    n, device = len(features), features.device
    raster = torch.arange(n, device=device)
    if k >= n:
        return features, raster
    needs = method.needs()
    image = ImageTokens(
        n=n,
        raster=raster,
        grids=(grid,),
        num_heads=num_heads,
        features=features if needs.features else None,
        vision=None if needs.vision is None or attention is None else needs.vision(attention),
        pixels=None if needs.pixels is None or patches is None else needs.pixels(patches),
        digest=digest(features.float()[None])[0] if needs.digest else None,
        **({} if needs.ahead is None or ahead is None else ahead()),
    )
    selection = method.select(image, k)
    rows = features
    if selection.merges is not None and selection.weights is not None:
        source, slot = selection.merges.unbind(1)
        parts = (
            features[source].float() * selection.weights[:, None].float()
        )  # summed in float32 and rounded once
        total = torch.zeros_like(features, dtype=torch.float32).index_add_(0, slot, parts)
        replaced = torch.zeros(n, dtype=torch.bool, device=device).index_fill_(0, slot, True)
        rows = torch.where(replaced[:, None], total.to(features.dtype), features)
    return rows.index_select(0, selection.keep), selection.keep
