"""What a cut at a layer would show a method, image by image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

import tokenprune
from tokenprune.methods import ImageTokens, Method, Needs, Selection
from tokenprune.methods.base import State


@dataclass(frozen=True)
class _Record(Method):
    """Keeps what it is shown; any tokens will do."""

    name: ClassVar[str] = "record"
    min_layer: ClassVar[int] = 1

    states: tuple[State, ...] = ()
    images: list[ImageTokens] = field(default_factory=list)

    def needs(self) -> Needs:
        return Needs(states=self.states)

    def select(self, image: ImageTokens, k: int) -> Selection:
        self.images.append(image)
        return Selection(torch.arange(k, device=image.raster.device))


def images_at(
    model: Any, calls: Iterable[Mapping[str, Any]], states: tuple[State, ...], layer: int
) -> list[ImageTokens]:
    """Every image in `calls`, with the states named, as a cut at `layer` would score it."""
    method = _Record(states=states)
    with tokenprune.pruned(model, method, layer=layer, keep=1, budget="after_cut"), torch.no_grad():
        for inputs in calls:
            model(**inputs, logits_to_keep=1)
    return method.images
