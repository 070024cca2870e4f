"""The states that a decoder layer's attention is computed from: how they are caught, and read token by token.

The one place where hooks catch them: for methods, for analysis and for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenprune.models.decoders import Decoder
from tokenprune.tokens import State

Pick = Callable[[Tensor], Tensor]


@dataclass
class LayerStates:
    """Of one forward of one layer.

    Attributes:
        decoder: the kind of text model.
        module: the layer's attention module.
        rope: its rotary embedding, of all positions.
        raw: by state ("query", "key", "value"), what the decoder's `state_module` put out.
    """

    decoder: Decoder
    module: nn.Module
    rope: Any
    raw: dict[str, Tensor] = field(default_factory=dict)

    def of(self, state: str, pick: Pick, turned: bool = True) -> Tensor:
        """A state as attention uses it, rotary embedding applied to queries and keys.

        Args:
            state: its name.
            pick: takes the tokens wanted out of a tensor (B | 1, L, ...): (n, ...).
            turned: whether the rotary embedding is wanted.

        Returns:
            (n, heads, head_dim); it may be a view of the model's own.
        """
        raw = self.raw[state]
        own = pick(self.decoder.by_token(self.module, raw))
        if state == "value" or not turned:
            return own
        # With several devices the layer's inputs are moved only inside its forward.
        rope = self.decoder.rope_of(self.rope, lambda part: pick(part.to(raw.device)))
        return self.decoder.rotate(self.module, own, rope)


def last_row(states: LayerStates, row: int, slots: Tensor, columns: Tensor) -> Tensor:
    """Attention probabilities (heads, keys) of a row's last real position over the real positions it sees.

    Args:
        states: what the layer computes it from.
        row: of the batch.
        slots: (keys,) places of its real positions in the states, in any order.
        columns: (keys,) their columns in the unpruned prompt; the largest is the query's.
    """
    module: Any = states.module
    last = columns.max()
    query = states.of("query", picked(row, slots.max().reshape(1)))[0].float()
    key = states.of("key", picked(row, slots)).float()
    key = key.repeat_interleave(query.shape[0] // key.shape[1], dim=1)
    logits = torch.einsum("hd,khd->hk", query, key) * module.scaling
    cap = getattr(module.config, "attn_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    window = getattr(module, "sliding_window", None)
    if window is None and not hasattr(module, "sliding_window"):
        window = getattr(module.config, "sliding_window", None)
    if window is not None:
        logits = logits.masked_fill(columns <= last - window, -torch.inf)
    sinks = getattr(module, "sinks", None)  # (heads,) logits of a column that is nobody's
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks.float()[:, None]], dim=1).softmax(-1)[:, :-1]


def asked_for(output: Any, asked: int | Tensor | None) -> Any:
    """A text model's output, its states those of the logits asked for.

    A model that hands `logits_to_keep` on to its text model takes states of the prompt's length for all of them, and
    others for those asked for already (Gemma 4).
    """
    if asked is None or (isinstance(asked, int) and not asked) or output is None:  # None: it failed
        return output
    states = output[0]
    kept = states[:, -asked:] if isinstance(asked, int) else states[:, asked]
    if isinstance(output, tuple):
        return kept, *output[1:]
    return type(output)(**{**dict(output), "last_hidden_state": kept})


def picked(row: int, columns: Tensor) -> Callable[[Tensor], Tensor]:
    """Takes a row's columns (n,) out of a tensor (B | 1, L, ...)."""
    return lambda x: x[row if len(x) > 1 else 0].index_select(0, columns.to(x.device))


class EnoughSeen(Exception):
    """Leaves the text model in the middle: what was looked for is there."""


@dataclass
class Ahead:
    """What is wanted of the text model running on images alone (`runtime/ahead.py`), and what it has shown.

    Attributes:
        layer: K: states of layer K - 1 are wanted, or else those that enter layer K.
        states: which of "query", "key" and "value"; none: what enters the layer.
        caught, hidden: what was seen, (m, n, ...).
    """

    layer: int
    states: tuple[str, ...]
    caught: LayerStates | None = None
    hidden: Tensor | None = None

    def row(self, i: int) -> Ahead:
        """Of one image."""
        caught = self.caught
        if caught is not None:
            rope = caught.decoder.rope_of(caught.rope, lambda part: part[i if len(part) > 1 else 0])
            raw = {name: own[i] for name, own in caught.raw.items()}
            caught = LayerStates(caught.decoder, caught.module, rope, raw)
        return Ahead(self.layer, self.states, caught, None if self.hidden is None else self.hidden[i])


class Observer(Protocol):
    """Somebody who looks at the states of a model's calls beside its method; see `Taps.observe`.

    Attributes:
        states: which of "query", "key" and "value" it wants of every layer.
    """

    states: tuple[State, ...]

    def saw_hidden(self, layer: int, hidden: Tensor, call: Any) -> None:
        """The states (B, L', D) that enter a layer; layer = the number of layers: the final norm."""

    def saw_states(self, layer: int, states: LayerStates, call: Any) -> None:
        """What a layer's attention is computed from, before the next layer is entered."""
