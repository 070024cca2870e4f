"""Hooks that catch what methods see: states of the layer before a cut, and the vision tower's attention.

They are armed when settings first need them and stay until the model is unwrapped; each asks the call under way
whether anybody wants what it catches.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.config import PruneConfig
from tokenprune.errors import TokenPruneError
from tokenprune.models.base import VisionCall, VisionTap
from tokenprune.models.decoders import Decoder, check_states
from tokenprune.runtime import compiled
from tokenprune.runtime.compiled import nothing_in_a_step
from tokenprune.runtime.selections import check_selection
from tokenprune.runtime.state import Call
from tokenprune.runtime.states import LayerStates, Observer
from tokenprune.runtime.vision import VisionFacts, attach_facts, sizes_on_host
from tokenprune.runtime.wrapped import Wrapped
from tokenprune.tokens import Selection


@dataclass
class _TowerCall:
    """One call of the vision tower.

    Attributes:
        seen: what was caught of it; None once it has been read, or where nobody asks.
        outputs: of the tap's sources so far.
        attention: what the method made of each picture's attention.
    """

    seen: VisionCall | None = None
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    attention: list[Tensor] = field(default_factory=list)


class _Towers(threading.local):
    """The vision tower's call under way in this thread."""

    current: _TowerCall | None = None


class Taps:
    """Args:
    runtime: whose hooks they are.
    """

    def __init__(self, runtime: Wrapped) -> None:
        self.runtime = runtime
        self.vision: VisionTap | None = None
        self._towers = _Towers()
        self.observers: tuple[Observer, ...] = ()
        self._armed: dict[tuple[int, str], nn.Module] = {}  # by layer and state

    def install(self) -> None:
        # The features' grid is noted even when nobody scores: generate() encodes images ahead of the forward.
        tower = self.runtime.family.vision_tower(self.runtime.model)
        self.runtime.before(tower, self._enter_tower)
        self.runtime.after(tower, self._leave_tower, always=True)

    def arm(self, config: PruneConfig) -> None:
        """Register what these settings' method needs and nobody needed before."""
        if not _scores(config):
            return
        self._arm_states(_wanted(config))
        if config.method.needs().vision is not None and self.vision is None:
            compiled.forget()
            tap = self.runtime.family.vision_tap(self.runtime.model)
            self.runtime.before(tap.attention, self._enter_vision)
            for source in tap.sources:
                self.runtime.after(source, self._catch_vision)
            self.vision = tap

    def _arm_states(self, wanted: Sequence[tuple[int, str]]) -> None:
        runtime = self.runtime
        missing = [key for key in wanted if key not in self._armed]
        if missing:
            compiled.forget()
        for layer, state in missing:
            attention = runtime.family.attention(runtime.layers[layer])
            module = runtime.decoder.state_module(attention, state)
            if not any(at == layer for at, _ in self._armed):
                runtime.before(attention, partial(self._enter_attention, layer), nothing_in_a_step)
            quick = partial(_no_state_in_a_step, runtime.decoder, attention)
            runtime.after(module, partial(self._catch_state, layer, state), quick)
            self._armed[layer, state] = module

    def disarm(self) -> None:
        """The hooks are gone."""
        self._armed.clear()
        self.vision = None

    def observe(self, observer: Observer) -> None:
        """Show the states of every later call to somebody, until `leave`.

        Raises:
            UnsupportedModelError: states are wanted that this kind of text model does not offer.
        """
        if observer.states:
            check_states(self.runtime.text_config)
            self._arm_states(
                [(layer, state) for layer in range(len(self.runtime.layers)) for state in observer.states]
            )
        self.observers = (*self.observers, observer)

    def leave(self, observer: Observer) -> None:
        """Show it nothing more."""
        self.observers = tuple(own for own in self.observers if own is not observer)

    def show_hidden(self, layer: int, hidden: Tensor, call: Call) -> None:
        """States (B, L', D) entering a layer, for those who observe."""
        for observer in self.observers:
            observer.saw_hidden(layer, hidden, call)

    def check(self, config: PruneConfig) -> None:
        """Adapters put in or merged since: the hooks would see other states than the model uses, or none at all.

        Raises:
            TokenPruneError: modules were replaced.
        """
        if not _scores(config):
            return
        runtime = self.runtime
        replaced = any(
            runtime.decoder.state_module(runtime.family.attention(runtime.layers[layer]), state)
            is not self._armed[layer, state]
            for layer, state in _wanted(config)
        )
        if config.method.needs().vision is not None and self.vision is not None:
            now = runtime.family.vision_tap(runtime.model).sources
            replaced |= any(a is not b for a, b in zip(now, self.vision.sources, strict=True))
        if replaced:
            raise TokenPruneError(
                "modules whose outputs are scored were replaced since tokenprune.wrap; unwrap the model and wrap it "
                "again"
            )

    # -- decoder states -----------------------------------------------------------------------------------------------

    def _enter_attention(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        call = self.runtime.call
        if call is not None and (self.observers or self._scored(call, layer)):
            call.caught = LayerStates(self.runtime.decoder, module, kwargs["position_embeddings"])

    def _catch_state(
        self, layer: int, state: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        """Score as soon as the last state a method needs is there; nothing but its selection is kept."""
        call = self.runtime.call
        if call is None or call.caught is None:
            return
        caught = call.caught
        caught.raw[state] = output
        needed = call.config.method.needs().states if self._scored(call, layer) else ()
        if state in needed and caught.raw.keys() >= set(needed):
            self.select(call, call.cuts_done, caught=caught)
            needed = ()
        for observer in self.observers:
            if state in observer.states and caught.raw.keys() >= set(observer.states):
                observer.saw_states(layer, caught, call)
        wanted = {state for at, state in self._armed if at == layer}
        if "hidden" not in needed and caught.raw.keys() >= wanted:
            call.caught = None

    def _scored(self, call: Call, layer: int) -> bool:
        """Whether the call's next cut scores states of this layer."""
        if call.stages is None or call.config.arguments.keep_lists is not None:
            return False
        cuts = call.config.cuts
        return call.cuts_done < len(cuts) and cuts[call.cuts_done].layer == layer + 1

    def select(
        self, call: Call, cut: int, *, hidden: Tensor | None = None, caught: LayerStates | None = None
    ) -> None:
        """Fill in the cut's selections where they are missing.

        Args:
            call: under way.
            cut: its number.
            hidden: (B, L', D) states entering the cut's layer.
            caught: states of the layer before it.
        """
        stages, method = call.stages, call.config.method
        assert stages is not None and call.views is not None
        if call.config.arguments.keep_lists is not None:
            stages.force(cut)
            return
        wanted = stages.missing(cut)
        if not wanted:
            return
        needed = method.needs().states
        source = hidden if hidden is not None else next(iter(caught.raw.values()))  # type: ignore[union-attr]
        with torch.no_grad(), call.scoring.running(source.device):
            for key in wanted:
                own: dict[str, Tensor] = {}
                for name in needed:
                    if name == "hidden":
                        assert hidden is not None
                        own[name] = _apart(stages.take(hidden, key), hidden)
                    else:
                        assert caught is not None
                        own[name] = _apart(caught.of(name, partial(stages.take, key=key)), caught.raw[name])
                image, k = call.views.of(stages, key, **own), stages.plan.to_choose(cut, key)
                selection = method.select(image, k) if k else Selection(image.raster[:0])
                check_selection(method.name, selection, image.n, k)
                stages.store(cut, key, selection)

    # -- the vision tower ---------------------------------------------------------------------------------------------

    def _enter_tower(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._towers.current = tower = _TowerCall()
        config, call = self._asking(), self.runtime.call
        if self.vision is None or not _scores(config) or config.method.needs().vision is None:
            return
        sizes = None
        if self.vision.packed:  # once per call, before its layers
            _, given = self.runtime.family.tower_input(args, kwargs)
            sizes = sizes_on_host(given, [] if call is None else call.sizes)
        tower.seen = VisionCall(kwargs, {}, (), sizes)

    def _enter_vision(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tower = self._towers.current
        if tower is not None and tower.seen is not None:
            tower.seen = replace(tower.seen, attention=kwargs)

    def _catch_vision(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Reduce each picture's attention to the floats the method wants, as soon as queries and keys are there."""
        tower, tap = self._towers.current, self.vision
        if tower is None or tower.seen is None or tap is None:
            return
        tower.outputs[module] = output
        if len(tower.outputs) < len(tap.sources):
            return
        reduce = self._asking().method.needs().vision
        assert reduce is not None
        outputs = [tower.outputs[source] for source in tap.sources]
        with torch.no_grad():
            for parts in tap.read(replace(tower.seen, outputs=outputs)):
                tower.attention.append(torch.cat([reduce(own) for own in parts]))
        tower.seen, tower.outputs = None, {}

    def _leave_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tower, self._towers.current = self._towers.current, None
        if output is None or tower is None:  # it failed
            return
        config, call, family = self._asking(), self.runtime.call, self.runtime.family
        pixels, sizes = family.tower_input(args, kwargs)
        facts = VisionFacts(sizes, attention=tower.attention)
        if _scores(config) and config.method.needs().digest:
            facts.digests = family.digests(pixels, sizes)
        if call is not None:
            for kind in [k for k in ("image", "video") if k in call.kinds and k not in call.facts][:1]:
                call.facts[kind] = facts
        # Inside a call nobody reads them there, but what looks like one may have been left behind by an interrupt.
        attach_facts(output, facts)

    def _asking(self) -> PruneConfig:
        """The settings of the call under way, or of the one that generate() encodes images ahead of."""
        call = self.runtime.call
        return self.runtime.settings if call is None else call.config


def _scores(config: PruneConfig) -> bool:
    """Whether the method is asked at all."""
    return config.arguments.keep_lists is None and bool(config.cuts)


def _wanted(config: PruneConfig) -> list[tuple[int, str]]:
    """The layers and projected states that are scored."""
    projected = [s for s in config.method.needs().states if s != "hidden"]
    return [(cut.layer - 1, state) for cut in config.cuts for state in projected]


def _apart(own: Tensor, source: Tensor) -> Tensor:
    """Never a view of the model's own states: a method that writes into what it is shown changes nothing else."""
    return own.clone() if own.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() else own


def _no_state_in_a_step(
    decoder: Decoder, attention: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> Any:
    return None if decoder.by_token(attention, output).shape[1] == 1 else NotImplemented
