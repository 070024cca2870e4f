"""Hooks that catch what methods and observers see of the decoder: states of the layer before a cut, or of any.

They are armed when settings first need them and stay until the model is unwrapped; each asks the call under way
whether anybody wants what it catches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.config import PruneConfig
from tokenprune.errors import UnsupportedModelError
from tokenprune.methods.seen import Needs
from tokenprune.models.decoders import Decoder, check_states
from tokenprune.runtime import compiled
from tokenprune.runtime.call import Call
from tokenprune.runtime.choose import choose
from tokenprune.runtime.compiled import nothing_in_a_step
from tokenprune.runtime.layer_states import EnoughSeen, LayerStates, Observer
from tokenprune.runtime.tower import TowerTap
from tokenprune.runtime.wrapped import Wrapped
from tokenprune.tensors import gathered, split_over


class Taps:
    """Args:
    runtime: whose hooks they are.
    tower: what looks into the vision tower.
    """

    def __init__(self, runtime: Wrapped, tower: TowerTap) -> None:
        self.runtime, self.tower = runtime, tower
        self.observers: tuple[Observer, ...] = ()
        self._armed: set[tuple[int, str]] = set()  # layers and states

    def install(self) -> None:
        self.tower.install()

    def arm(self, config: PruneConfig) -> None:
        """Register what these settings' method needs and nobody needed before; all of it, or nothing."""
        if config.scores:
            self._arm(_wanted(config), config.needs)

    def _arm(self, wanted: Sequence[tuple[int, str]], needs: Needs) -> None:
        known, before = len(self.runtime.hooks), (set(self._armed), self.tower.tap)
        try:
            self._arm_states([key for key in wanted if key not in self._armed])
            self.tower.arm(needs)
        except BaseException:
            self.runtime.take_off(known)
            self._armed, self.tower.tap = before
            raise

    def _arm_states(self, missing: Sequence[tuple[int, str]]) -> None:
        runtime = self.runtime
        if missing:
            compiled.forget()
        for layer, state in missing:
            attention = runtime.family.attention(runtime.layers[layer])
            if not any(at == layer for at, _ in self._armed):
                enter = partial(self._enter_attention, layer)
                runtime.before(attention, enter, nothing_in_a_step, asleep=True, follows=True)
            quick = partial(_no_state_in_a_step, runtime.decoder, attention)
            module = runtime.decoder.state_module(attention, state)
            runtime.after(module, partial(self._catch_state, layer, state), quick, asleep=True, follows=True)
            self._armed.add((layer, state))

    def disarm(self) -> None:
        """The hooks are gone."""
        self._armed.clear()
        self.tower.disarm()

    def observe(self, observer: Observer) -> None:
        """Show the states of every later call to somebody, until `leave`.

        Raises:
            UnsupportedModelError: states are wanted that this kind of text model does not offer.
        """
        if observer.states:
            check_states(self.runtime.text_config)
            layers = self.runtime.attending
            if len(layers) < len(self.runtime.layers):
                raise UnsupportedModelError(
                    f"the states of every layer are wanted, and of this {self.runtime.family.name} model only layers "
                    f"{', '.join(map(str, layers))} attend; use what reads hidden states"
                )
            self._arm([(layer, state) for layer in layers for state in observer.states], Needs())
        self.observers = (*self.observers, observer)

    def leave(self, observer: Observer) -> None:
        """Show it nothing more."""
        self.observers = tuple(own for own in self.observers if own is not observer)

    def show_hidden(self, layer: int, hidden: Tensor, call: Call) -> None:
        """States (B, L', D) entering a layer, for those who observe."""
        for observer in self.observers:
            observer.saw_hidden(layer, hidden, call)

    # -- decoder states -----------------------------------------------------------------------------------------------

    def _enter_attention(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        call, ahead = self.runtime.call, self.runtime.calls.ahead
        if ahead is not None and call is None:
            if layer == ahead.layer - 1 and ahead.states:
                ahead.caught = LayerStates(self.runtime.decoder, module, kwargs["position_embeddings"])
            return
        if call is not None and (self.observers or self._scored(call, layer)):
            call.caught = LayerStates(self.runtime.decoder, module, kwargs["position_embeddings"])

    def _catch_state(
        self, layer: int, state: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        """Score as soon as the last state a method needs is there; nothing but its selection is kept."""
        call, ahead = self.runtime.call, self.runtime.calls.ahead
        if (call is not None and call.caught is not None) or ahead is not None:
            output = self._of_all_ranks(layer, state, output)
        if ahead is not None and call is None and ahead.caught is not None and layer == ahead.layer - 1:
            # Tokens along dimension 1 whatever the decoder, so that images can be told apart.
            ahead.caught.raw[state] = self.runtime.decoder.by_token(ahead.caught.module, output).flatten(2)
            if ahead.caught.raw.keys() >= set(ahead.states):
                raise EnoughSeen
            return
        if call is None or call.caught is None:
            return
        caught = call.caught
        caught.raw[state] = output
        needs = call.config.needs_at(call.cuts_done) if self._scored(call, layer) else Needs()
        # A method that wants the cut's own input too is asked when that is there.
        waits = "hidden" in (*needs.states, *needs.prompt)
        if state in needs.projected and caught.raw.keys() >= set(needs.projected) and not waits:
            choose(call, call.cuts_done, caught=caught)
        for observer in self.observers:
            if state in observer.states and caught.raw.keys() >= set(observer.states):
                observer.saw_states(layer, caught, call)
        wanted = {state for at, state in self._armed if at == layer}
        if not waits and caught.raw.keys() >= wanted:
            call.caught = None

    def _of_all_ranks(self, layer: int, state: str, output: Tensor) -> Tensor:
        """With all heads, where tensor parallelism gives each rank some: all ranks then keep the same tokens."""
        decoder, attention = self.runtime.decoder, self.runtime.family.attention(self.runtime.layers[layer])
        mesh = split_over(getattr(attention, f"{state[0]}_proj", None))
        if mesh is None:
            return output
        # `by_token` is its own inverse on states that are told apart by head.
        return decoder.by_token(attention, gathered(decoder.by_token(attention, output), mesh, 2))

    def _scored(self, call: Call, layer: int) -> bool:
        """Whether the call's next cut scores states of this layer."""
        if call.stages is None or not call.config.scores:
            return False
        cuts = call.config.cuts
        return call.cuts_done < len(cuts) and cuts[call.cuts_done].layer == layer + 1


def _wanted(config: PruneConfig) -> list[tuple[int, str]]:
    """The layers and projected states that are scored."""
    found = []
    for number, cut in enumerate(config.cuts):
        needs = config.needs_at(number)
        layer = cut.layer if needs.ahead is None else needs.ahead
        found += [(layer - 1, state) for state in needs.projected]
    return list(dict.fromkeys(found))


def _no_state_in_a_step(
    decoder: Decoder, attention: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> Any:
    return None if decoder.by_token(attention, output).shape[1] == 1 else NotImplemented
