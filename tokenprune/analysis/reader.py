"""Shows a model's states to callbacks, layer by layer, while it reads a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.api import family_of, runtime_of
from tokenprune.arguments import Arguments
from tokenprune.models import stock_model
from tokenprune.runtime.call import Call
from tokenprune.runtime.install import Runtime
from tokenprune.runtime.layer_states import LayerStates
from tokenprune.settle import settle
from tokenprune.tokens import Image, State


@dataclass(frozen=True)
class Prompt:
    """Where things are in the states that are shown: in those of a pruned call, what is left of them.

    Attributes:
        images: images of each row.
        visual: visual[row][image], (n,) places of its tokens, on the device.
        raster: raster[row][image], (n,) their raster indices among the image's original tokens.
        text: text[row], places of everything else that is no padding.
    """

    images: list[list[Image]]
    visual: list[list[Tensor]]
    raster: list[list[Tensor]]
    text: list[Tensor]


OnHidden = Callable[[int, Tensor, Prompt], None]
OnStates = Callable[[int, LayerStates, Prompt], None]


class Reader:
    """A context in which prompts of the model are read as they pass; nothing is copied or changed.

    A stock model is read unpruned. A wrapped one is read as it is, whatever its settings.

    Args:
        model: a stock or wrapped model.
        hidden: called with l, the states (B, L, D) that enter layer l (l = number of layers: the final norm) and the
            prompt.
        on_states: called with l, what layer l's attention is computed from, and the prompt.
        states: which of "query", "key" and "value" that holds.

    Raises:
        UnsupportedModelError: its family is unknown, or its text model does not offer the states.
    """

    def __init__(
        self,
        model: Any,
        hidden: OnHidden | None = None,
        on_states: OnStates | None = None,
        states: tuple[State, ...] = ("query", "key"),
    ) -> None:
        self.model = stock_model(model)
        self.family = family_of(model)
        self.layers = list(self.family.layers())
        self.states = states if on_states is not None else ()
        self._hidden, self._on_states = hidden, on_states
        wrapped = runtime_of(model)
        self._own = wrapped is None
        self._runtime = wrapped or Runtime(self.family, settle(self.family, Arguments("none")))
        self._seen: tuple[Call, int] | None = None
        self._prompt: Prompt | None = None

    def __enter__(self) -> Reader:
        if self._own:
            self._runtime.install()
        try:
            self._runtime.taps.observe(self)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._runtime.taps.leave(self)
        if self._own:
            self._runtime.remove()
        self._seen = self._prompt = None

    def read(self, inputs: Mapping[str, Any]) -> None:
        """Run one prefill over the inputs a processor made; only the last position's logits are computed."""
        with torch.inference_mode():
            self.model(**inputs, use_cache=False, logits_to_keep=1)

    def saw_hidden(self, layer: int, hidden: Tensor, call: Call) -> None:
        if self._hidden is not None and call.rows is not None:
            self._hidden(layer, hidden, self._located(call, hidden.device))

    def saw_states(self, layer: int, states: LayerStates, call: Call) -> None:
        if self._on_states is not None and call.rows is not None:
            device = next(iter(states.raw.values())).device
            self._on_states(layer, states, self._located(call, device))

    def _located(self, call: Call, device: torch.device) -> Prompt:
        seen = (call, call.cuts_done)
        if self._seen != seen or self._prompt is None:
            self._seen, self._prompt = seen, _locate(call, device)
        return self._prompt


def _locate(call: Call, device: torch.device) -> Prompt:
    assert call.rows is not None
    keys = [[(r, i) for i in range(len(row))] for r, row in enumerate(call.rows)]
    if call.stages is not None and call.cuts_done:
        stages, left = call.stages, call.stages.done[-1]
        images = stages.plan.rows
        keys = [[(r, i) for i in range(len(row))] for r, row in enumerate(images)]
        visual = [[stages.slots(key).to(device) for key in row] for row in keys]
        raster = [[stages.raster[key].to(device) for key in row] for row in keys]
        real = (left.index >= 0 if left.visible is None else left.visible).to(device)
    else:
        images = call.rows
        visual = [[torch.from_numpy(image.columns).to(device) for image in row] for row in images]
        raster = [[torch.arange(image.n, device=device) for image in row] for row in images]
        real = torch.ones(call.batch, call.length, dtype=torch.bool, device=device)
        if call.attention is not None:
            real = call.attention[:, -call.length :].to(device) != 0
    text = []
    for r, row in enumerate(visual):
        is_text = real[r].clone()
        for places in row:
            is_text[places] = False
        text.append(is_text.nonzero()[:, 0])
    return Prompt(images, visual, raster, text)
