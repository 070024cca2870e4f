"""A method's choice for one image inside the encoder, with the library's own methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.hashing import digest
from tokenprune.methods import ImageTokens, Method
from tokenprune.tokens import Grid


def choose_rows(
    method: Method,
    features: Tensor,
    k: int,
    grids: tuple[Grid, ...],
    seen: Mapping[str, Any],
    num_heads: int = 0,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep `k` of an image's features.

    Args:
        method: see `read_settings`.
        features: (n, D) as the projector puts them out; deep-stack features may stand behind them.
        k: how many.
        grids: their layout.
        seen: what else the method wants to see, by the names of `ImageTokens`.
        num_heads: of the decoder.
        width: of the embedding, which is what the method sees; None: all of D.

    Returns:
        (k, D) features, merged where the method merges (all that stands in a row alike), and (k,) the raster indices
        they are of.
    """
    n = len(features)
    raster = torch.arange(n, device=features.device)
    if k >= n:
        return features, raster
    needs = method.needs()
    image = ImageTokens(
        n=n,
        raster=raster,
        grids=grids,
        num_heads=num_heads,
        features=features[:, :width] if needs.features else None,
        digest=digest(features[:, :width].float()[None])[0] if needs.digest else None,
        **seen,
    )
    selection = method.select(image, k)
    return selection.merged(features).index_select(0, selection.keep), selection.keep
