"""What every decoder layer does to the tokens, measured on calibration samples: one prefill each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.analysis.reader import Prompt, Reader
from tokenprune.errors import ConfigError
from tokenprune.estimators import Estimator, estimate, make_estimator
from tokenprune.runtime.layer_states import LayerStates, last_row, picked
from tokenprune.tokens import Image
from tokenprune_kernels.dual_gram_entropy import dual_gram_entropy

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LayerStatistics:
    """Layer-by-layer measurements; L decoder layers, h heads.

    Attributes:
        visual: by estimator, (images, L + 1) diversity of each image's tokens on entering layer l; l = L is the input
            of the final norm. NaN where fewer than two tokens differ from their mean.
        text: by estimator, (rows, L + 1) the same of each row's other tokens.
        tokens: (images,) visual tokens of each image.
        attention_entropy: (rows, L, h) entropy of the last position's attention over log(keys), in [0, 1].
        visual_share: (rows, L) share of the last position's attention that goes to visual tokens, mean over heads.
        maps: of each image of the first prompts asked for, (L, n) the matrix entropy of each token's query heads in
            layer l, which a cut at layer l + 1 would score (EntropyPrune, trace-normalised).
        images: those images.
    """

    visual: dict[str, FloatArray]
    text: dict[str, FloatArray]
    tokens: NDArray[np.int64]
    attention_entropy: FloatArray
    visual_share: FloatArray
    maps: list[FloatArray]
    images: list[Image]

    @property
    def num_layers(self) -> int:
        return next(iter(self.visual.values())).shape[1] - 1


def read_layers(
    model: Any,
    calls: Iterable[Mapping[str, Any]],
    estimators: Sequence[str | Estimator] = ("von_neumann",),
    *,
    attention: bool = True,
    maps: int = 0,
) -> LayerStatistics:
    """Measure every layer of a model on calls of it, one prefill each.

    Nothing is copied: states are measured inside the layers' hooks and a number per image is kept.

    Args:
        model: a stock model; a wrapped one is measured as it is pruned.
        calls: inputs as its processor makes them, each a batch of any size.
        estimators: names or instances.
        attention: whether to measure attention too (of the last position only).
        maps: of how many prompts (the first ones) to keep every token's entropy.

    Raises:
        ConfigError: an unknown estimator, or calls without images.
    """
    made = [make_estimator(e) for e in estimators]
    if not made:
        raise ConfigError("name at least one estimator")
    measuring = _Measuring(made, attention, maps)
    reader = Reader(model, hidden=measuring.hidden, on_states=measuring.states if attention or maps else None)
    measuring.num_layers = len(reader.layers)
    with reader:
        for inputs in calls:
            measuring.start()
            reader.read(inputs)
    if not measuring.tokens:
        raise ConfigError("the calibration samples have no images; give prompts with images")
    return measuring.statistics()


class _Measuring:
    num_layers: int

    def __init__(self, estimators: Sequence[Estimator], attention: bool, maps: int) -> None:
        self.estimators, self.wants_attention, self.wants_maps = estimators, attention, maps
        self.tokens: list[int] = []
        # values[kind][estimator][layer]: tensors () of one call after the other, left on the device
        self.values: dict[str, list[dict[int, list[Tensor]]]] = {
            kind: [{} for _ in estimators] for kind in ("visual", "text")
        }
        self.entropy: list[dict[int, Tensor]] = []
        self.share: list[dict[int, Tensor]] = []
        self.maps: list[dict[int, Tensor]] = []
        self.images: list[Image] = []
        self.mapped = 0  # prompts
        self._rows: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = []
        self._maps: list[tuple[int, int]] = []  # (row, image) of this call's images that are mapped

    def start(self) -> None:
        self._rows, self._maps = [], []

    def hidden(self, layer: int, states: Tensor, prompt: Prompt) -> None:
        if layer == 0:
            self.tokens += [image.n for row in prompt.images for image in row]
            rows = prompt.images[: max(0, self.wants_maps - self.mapped)]
            self.mapped += len(rows)
            self._maps = [(r, i) for r, row in enumerate(rows) for i in range(len(row))]
            self.maps += [{} for _ in self._maps]
            self.images += [prompt.images[r][i] for r, i in self._maps]
        for r, (images, text) in enumerate(zip(prompt.visual, prompt.text, strict=True)):
            for columns in images:
                self._measure("visual", layer, states[r], columns)
            self._measure("text", layer, states[r], text)

    def _measure(self, kind: str, layer: int, states: Tensor, columns: Tensor) -> None:
        tokens = states.index_select(0, columns.to(states.device))
        for e, estimator in enumerate(self.estimators):
            value = estimate(tokens, estimator) if len(columns) > 1 else states.new_full((), torch.nan)
            self.values[kind][e].setdefault(layer, []).append(value.float())

    def states(self, layer: int, states: LayerStates, prompt: Prompt) -> None:
        for (r, i), values in zip(self._maps, self.maps[len(self.maps) - len(self._maps) :], strict=True):
            heads = states.of("query", picked(r, prompt.visual[r][i]))
            values[layer] = dual_gram_entropy(heads, normalization="trace")
        if not self.wants_attention:
            return
        if not self._rows:
            self._rows = [({}, {}) for _ in prompt.text]
            self.entropy += [row[0] for row in self._rows]
            self.share += [row[1] for row in self._rows]
        for r, (entropy, share) in enumerate(self._rows):
            columns = torch.cat([*prompt.visual[r], prompt.text[r]])
            weights = last_row(states, r, columns, columns)
            entropy[layer] = -torch.special.xlogy(weights, weights).sum(-1) / math.log(len(columns))
            visual = sum(len(image) for image in prompt.visual[r])
            share[layer] = weights[:, :visual].sum(-1).mean()

    def statistics(self) -> LayerStatistics:
        def table(kind: str, e: int) -> FloatArray:
            layers = self.values[kind][e]
            stacked = torch.stack(
                [torch.stack(layers[l]).to("cpu", torch.float64) for l in range(self.num_layers + 1)], 1
            )
            return stacked.numpy()

        def rows(found: list[dict[int, Tensor]]) -> FloatArray:
            per_row = [
                torch.stack([row[l].to("cpu", torch.float64) for l in range(self.num_layers)])
                for row in found
            ]
            return torch.stack(per_row).numpy() if per_row else np.zeros((0, self.num_layers))

        names = [_label(e) for e in self.estimators]
        return LayerStatistics(
            visual={name: table("visual", e) for e, name in enumerate(names)},
            text={name: table("text", e) for e, name in enumerate(names)},
            tokens=np.asarray(self.tokens, dtype=np.int64),
            attention_entropy=rows(self.entropy),
            visual_share=rows(self.share),
            maps=[
                torch.stack([m[l].to("cpu", torch.float64) for l in range(self.num_layers)]).numpy()
                for m in self.maps
            ],
            images=self.images,
        )


def _label(estimator: Estimator) -> str:
    """The estimator's name, with its parameters where they are not the defaults."""
    changed = {k: v for k, v in vars(estimator).items() if v != getattr(type(estimator), k, v)}
    return estimator.name + "".join(f",{k}={v!r}" for k, v in changed.items())
