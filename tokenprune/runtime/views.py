"""What a method is shown of an image: nothing that is the runtime's or the model's own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenprune.hashing import digest, mix
from tokenprune.methods.base import ImageTokens
from tokenprune.models.base import Family
from tokenprune.runtime.plan import Key
from tokenprune.runtime.stages import Stages
from tokenprune.runtime.vision import VisionFacts
from tokenprune.tokens import Image


class Views:
    """Makes the views of one prompt's images.

    Args:
        model, family: whose prompt it is.
        num_heads: attention heads of the decoder.
        facts: what the vision tower's hook noted, by kind of image; it may fill up until layer 0 is entered.
        prompts: by image, a hash of the prompt; empty where the method wants none.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        num_heads: int,
        facts: Mapping[str, VisionFacts],
        prompts: Mapping[Key, Tensor],
    ) -> None:
        self.model, self.family, self.num_heads = model, family, num_heads
        self.facts, self.prompts = facts, prompts

    def of(self, stages: Stages, key: Key, /, **states: Tensor) -> ImageTokens:
        """An image as it is before the next cut.

        Args:
            stages: what is left.
            key: (row, image).
            states: (n, ...) of its remaining tokens, by name.
        """
        image, raster = stages.images[key], stages.raster[key].clone()
        if key in stages.plan.ends_row:
            raster, states = raster[:-1], {name: own[:-1] for name, own in states.items()}
        vision = seed = None
        noted = [(self.facts.get(part.kind), part) for part in image.parts or (image,)]
        if all(own is not None and own.attention for own, _ in noted):
            vision = torch.cat(
                [self._vision(own, part).to(raster.device) for own, part in noted if own is not None]
            )
            vision = vision if len(raster) == image.n else vision.index_select(0, raster)
        if all(own is not None and own.digests is not None for own, _ in noted):
            hashes = [_combined(own.digests[slice(*part.items)]) for own, part in noted if own is not None]  # type: ignore[index]
            seed = mix(_combined(torch.stack(hashes)).to(raster.device) + self.prompts[key].to(raster.device))
        return ImageTokens(
            n=len(raster),
            raster=raster,
            grids=image.grids,
            num_heads=self.num_heads,
            vision=vision,
            digest=seed,
            frame_floor=stages.plan.config.arguments.frame_floor,
            **states,
        )

    def _vision(self, facts: VisionFacts, image: Image) -> Tensor:
        return self.family.to_tokens(self.model, torch.stack(facts.attention[slice(*image.items)]), image)


def _combined(digests: Tensor) -> Tensor:
    """One hash of the hashes (m,) of the pictures an image consists of."""
    if len(digests) == 1:
        return digests[0]
    return mix(digests + torch.arange(len(digests), device=digests.device)).sum()


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
