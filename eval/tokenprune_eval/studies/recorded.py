"""What a cut at a layer would show a method, image by image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tokenprune.analysis.reader import Prompt, Reader
from tokenprune.methods import ImageTokens
from tokenprune.runtime.layer_states import LayerStates, picked
from tokenprune.tokens import State

SOURCES: tuple[State, ...] = ("query", "key", "value", "hidden")  # of EntropyPrune
NORMALIZATIONS = ("none", "trace")


def images_at(
    model: Any, calls: Iterable[Mapping[str, Any]], states: tuple[State, ...], layer: int
) -> list[ImageTokens]:
    """Every image in `calls`, with the states named, as a cut at `layer` would score it."""
    shown: list[dict[str, Tensor]] = []
    images: list[ImageTokens] = []

    def projected(l: int, caught: LayerStates, prompt: Prompt) -> None:
        if l == layer - 1:
            for r, row in enumerate(prompt.visual):
                for columns in row:
                    shown.append({s: caught.of(s, picked(r, columns)) for s in states if s != "hidden"})

    def hidden(l: int, entering: Tensor, prompt: Prompt) -> None:
        if l != layer:
            return
        keys = [(r, i) for r, row in enumerate(prompt.visual) for i in range(len(row))]
        for k, (r, i) in enumerate(keys):
            own: dict[str, Any] = dict(shown[k]) if shown else {}
            if "hidden" in states:
                own["hidden"] = picked(r, prompt.visual[r][i])(entering)
            raster, grids = prompt.raster[r][i], prompt.images[r][i].grids
            images.append(ImageTokens(len(raster), raster, grids, heads, **own))
        shown.clear()

    wanted: tuple[State, ...] = tuple(s for s in states if s != "hidden")
    reader = Reader(model, hidden, projected if wanted else None, wanted)
    text: Any = reader.family.text_model()
    heads: int = text.config.num_attention_heads
    with reader:
        for inputs in calls:
            reader.read(inputs)
    return images
