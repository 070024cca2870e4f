"""The states that a decoder layer's attention is computed from: how they are caught, and read token by token.

The one place where hooks catch them: for methods, for analysis and for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

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

    def of(self, state: str, pick: Pick) -> Tensor:
        """A state as attention uses it, rotary embedding applied to queries and keys.

        Args:
            state: its name.
            pick: takes the tokens wanted out of a tensor (B | 1, L, ...): (n, ...).

        Returns:
            (n, heads, head_dim); it may be a view of the model's own.
        """
        raw = self.raw[state]
        own = pick(self.decoder.by_token(self.module, raw))
        if state == "value":
            return own
        # With several devices the layer's inputs are moved only inside its forward.
        rope = self.decoder.rope_of(self.rope, lambda part: pick(part.to(raw.device)))
        return self.decoder.rotate(self.module, own, rope)


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
