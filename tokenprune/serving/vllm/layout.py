"""How many tokens a picture has and where they stand, from what its processor made, by the library's own families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.models.base import Family, Layout
from tokenprune.models.crops import side
from tokenprune.tokens import Image, IntArray


class Pictures:
    """A family's arithmetic without its model.

    Args:
        family: whose pictures they are.
        config: of the checkpoint.
    """

    side_by_side = True  # whether two of one size may follow each other without text between them

    def __init__(self, family: type[Family], config: Any) -> None:
        self.family, self.config = family(None, config), config

    def sizes(self, made: Mapping[str, Any]) -> dict[str, IntArray]:
        """Of each picture ("image") and video ("video") that the processor made; what a size means the family knows."""
        return {kind: np.asarray(sizes) for kind, sizes in self.family.sizes(made).items()}

    def layouts(self, kind: str, sizes: IntArray) -> list[Layout]:
        return self.family.layouts(kind, sizes)

    def parts(self, kind: str, layout: Layout) -> list[Layout]:
        """What of a picture or video has a budget of its own: all of it, or each frame."""
        return [layout]

    def crops(self, kind: str, layouts: list[Layout]) -> list[int]:
        """Rows that each picture has in fields that hold all pictures' pixels in one sequence."""
        return [1] * len(layouts)

    def check(self, made: Mapping[str, Any]) -> None:
        """Refuse what the model cannot take: past here it would stop the engine, and everybody's requests with it.

        Raises:
            ValueError: says what the model takes; the request is refused.
        """
        if made.get("image_embeds") is not None:
            raise ValueError("tokenprune: images have to come as pictures, not as embeddings")
        length = side(self.config.vision_config.image_size)
        for pixels in made.get("pixel_values", ()):
            if tuple(pixels.shape[-3:]) != (3, length, length):
                raise ValueError(
                    f"tokenprune: pictures were made {tuple(pixels.shape[-2:])} pixels large, and the model takes "
                    f"{length} x {length}; leave sizes out of mm_processor_kwargs"
                )

    def to_tokens(self, layout: Layout, patches: Tensor) -> Tensor:
        """Numbers (crops, m, c) of a picture's patches as (n, c) of its prunable tokens."""
        image = Image(
            np.arange(prunable(layout)), layout.grids, "image", 0, (0, layout.items), size=layout.size
        )
        return self.family.to_tokens(patches, image)

    def eight_bit(self, pixels: Tensor, sizes: IntArray | None = None) -> list[Tensor]:
        """Pixels as the tower is given them, as 8-bit patches (m, 3, p, p) of each crop or picture."""
        patches = self.family.patches(pixels, sizes)
        if pixels.dtype == torch.uint8:  # the model itself normalises them
            return list(patches)
        return [self.family.eight_bit(own) for own in patches]


def prunable(layout: Layout) -> int:
    """Tokens that may go."""
    return sum(grid.tokens for grid in layout.grids)


def structural(layout: Layout, device: torch.device | str = "cpu") -> Tensor:
    """(columns,) bool, True at tokens that always stay."""
    if layout.structural is None:
        return torch.zeros(layout.columns, dtype=torch.bool, device=device)
    return torch.from_numpy(layout.structural).to(device)
