"""How many tokens a picture has and where they stand, by the library's own families, from a config alone."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.models.base import Family, Layout
from tokenprune.tokens import Image


class Pictures:
    """A family's arithmetic without its model.

    Args:
        family: whose pictures they are.
        config: of the checkpoint.
        base: class of transformers whose `pack_image_features` the family asks; None where it asks none.
    """

    def __init__(self, family: Family, config: Any, base: Any = None) -> None:
        inner = SimpleNamespace(config=config)
        if base is not None:
            inner.pack_image_features = partial(base.pack_image_features, inner)
        self.family, self.config = family, config
        self._model: Any = SimpleNamespace(config=config, model=inner)

    def layout(self, height: int, width: int) -> Layout:
        """Of a picture of so many pixels; of families whose processors make one size of all, of that."""
        if not self.family.sizes_ahead:
            height = width = self.config.vision_config.image_size
        return self.family.layouts(self._model, "image", np.array([[height, width]]))[0]

    def to_tokens(self, layout: Layout, patches: Tensor) -> Tensor:
        """Numbers (crops, m, c) of a picture's patches as (n, c) of its prunable tokens."""
        image = Image(
            np.arange(prunable(layout)), layout.grids, "image", 0, (0, layout.items), size=layout.size
        )
        return self.family.to_tokens(self._model, patches, image)

    def eight_bit(self, crops: Tensor) -> list[Tensor]:
        """Normalised crops (c, 3, H, W) as 8-bit patches, (m, 3, p, p) of each."""
        return [
            self.family.eight_bit(self._model, own) for own in self.family.patches(self._model, crops, None)
        ]


def prunable(layout: Layout) -> int:
    """Tokens that may go."""
    return sum(grid.tokens for grid in layout.grids)


def structural(layout: Layout, device: torch.device | str = "cpu") -> Tensor:
    """(columns,) bool, True at tokens that always stay."""
    if layout.structural is None:
        return torch.zeros(layout.columns, dtype=torch.bool, device=device)
    return torch.from_numpy(layout.structural).to(device)
