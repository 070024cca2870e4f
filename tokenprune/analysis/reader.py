"""Shows a model's states to callbacks, layer by layer, while it reads a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.api import is_wrapped
from tokenprune.arguments import Arguments
from tokenprune.config import settle
from tokenprune.errors import TokenPruneError
from tokenprune.models import find_family, stock_model
from tokenprune.models.base import Image
from tokenprune.models.decoder import check_states, state_module
from tokenprune.runtime.frame import Frame
from tokenprune.runtime.install import Runtime


@dataclass(frozen=True)
class Prompt:
    """Where things are in the batch that is being read.

    Attributes:
        images: images of each row.
        visual: visual[row][image], (n,) columns of its tokens, on the device.
        text: text[row], columns of everything else that is no padding.
    """

    images: list[list[Image]]
    visual: list[list[Tensor]]
    text: list[Tensor]


@dataclass(frozen=True)
class Attention:
    """What a decoder layer's attention is computed from.

    Attributes:
        query, key: before rotary embedding, as the modules of `tokenprune.models.decoder` put them out.
        rope: the rotary embedding: cos and sin (B | 1, L, d'), or one complex tensor.
        module: the attention module.
    """

    query: Tensor
    key: Tensor
    rope: Any
    module: nn.Module


OnHidden = Callable[[int, Tensor, Prompt], None]
OnAttention = Callable[[int, Attention, Prompt], None]


class Reader:
    """A context in which calls of the model are read; nothing is pruned, copied or changed.

    Args:
        model: a stock model that is not wrapped.
        hidden: called with l, the states (B, L, D) that enter layer l (l = number of layers: the final norm) and the
            prompt.
        attention: called with l, what layer l's attention is computed from, and the prompt.

    Raises:
        TokenPruneError: the model is wrapped.
        UnsupportedModelError: its family is unknown.
    """

    def __init__(
        self, model: Any, hidden: OnHidden | None = None, attention: OnAttention | None = None
    ) -> None:
        if is_wrapped(model):
            raise TokenPruneError("the model is wrapped; tokenprune.unwrap(model) before its layers are read")
        self.model = stock_model(model)
        self.family = find_family(self.model)
        self.layers = list(self.family.layers(self.model))
        self._runtime = Runtime(self.model, self.family, settle(self.model, self.family, Arguments("none")))
        if attention is not None:
            check_states(self.family.text_model(self.model).config)
        self._hidden, self._attention = hidden, attention
        self._handles: list[RemovableHandle] = []
        self._frame: Frame | None = None
        self._prompt: Prompt | None = None
        self._caught: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        self._runtime.install()
        for i, layer in enumerate(self.layers):
            if self._hidden is not None:
                self._before(layer, partial(self._enter_layer, i))
            if self._attention is not None:
                module = self.family.attention(layer)
                self._before(module, self._enter_attention)
                for state in ("query", "key"):
                    hook = partial(self._catch, i, state)
                    self._handles.append(state_module(module, state).register_forward_hook(hook))
        if self._hidden is not None:
            self._before(self.family.final_norm(self.model), partial(self._enter_layer, len(self.layers)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._runtime.remove()
        self._frame = self._prompt = None
        self._caught = {}

    def read(self, inputs: Mapping[str, Any]) -> None:
        """Run one prefill over the inputs a processor made; only the last position's logits are computed."""
        with torch.inference_mode():
            self.model(**inputs, use_cache=False, logits_to_keep=1)

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _enter_layer(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        prompt = self._located(states.device)
        if prompt is not None and self._hidden is not None:
            self._hidden(i, states, prompt)

    def _enter_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._caught = {"rope": kwargs["position_embeddings"], "module": module}

    def _catch(self, i: int, state: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self._caught[state] = output
        if "query" not in self._caught or "key" not in self._caught:
            return
        caught, self._caught = self._caught, {}
        prompt = self._located(output.device)
        if prompt is not None and self._attention is not None:
            rope = caught["rope"]
            rope = rope.to(output.device) if isinstance(rope, Tensor) else [x.to(output.device) for x in rope]
            self._attention(i, Attention(caught["query"], caught["key"], rope, caught["module"]), prompt)

    def _located(self, device: torch.device) -> Prompt | None:
        frame = self._runtime.frame
        if frame is None or frame.rows is None:
            return None
        if self._frame is not frame:
            self._frame, self._prompt = frame, _locate(frame, device)
        return self._prompt


def _locate(frame: Frame, device: torch.device) -> Prompt:
    assert frame.rows is not None
    visual = [[torch.from_numpy(image.columns).to(device) for image in row] for row in frame.rows]
    mask = frame.attention
    text = []
    for r, row in enumerate(visual):
        is_text = torch.ones(frame.length, dtype=torch.bool, device=device)
        if mask is not None:
            is_text &= mask[r, -frame.length :].to(device) != 0
        for columns in row:
            is_text[columns] = False
        text.append(is_text.nonzero()[:, 0])
    return Prompt(frame.rows, visual, text)
