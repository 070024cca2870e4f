"""Hooks that catch what methods see: states of the layer before a cut, and the vision tower's attention.

They are armed when settings first need them and stay until the model is unwrapped; each asks the call under way
whether anybody wants what it catches.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.config import PruneConfig
from tokenprune.errors import TokenPruneError
from tokenprune.methods.base import Selection
from tokenprune.models.base import VisionCall, VisionTap
from tokenprune.models.decoder import by_token, rotate, state_module
from tokenprune.runtime import compiled
from tokenprune.runtime.frame import Frame
from tokenprune.runtime.layers import nothing_in_a_step
from tokenprune.runtime.pruning import Key, Pruning
from tokenprune.runtime.selections import check_selection
from tokenprune.runtime.vision import VisionFacts, attach_facts, sizes_on_host

if TYPE_CHECKING:
    from tokenprune.runtime.install import Runtime


@dataclass
class _TowerCall:
    """One call of the vision tower.

    Attributes:
        call: what was caught of it; None once it has been read, or where nobody asks.
        outputs: of the tap's sources so far.
        attention: what the method made of each picture's attention.
    """

    call: VisionCall | None = None
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    attention: list[Tensor] = field(default_factory=list)


class _Towers(threading.local):
    """The vision tower's call under way in this thread."""

    current: _TowerCall | None = None


class Taps:
    """Args:
    runtime: whose hooks they are.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.vision: VisionTap | None = None
        self._towers = _Towers()
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
        runtime, needs = self.runtime, config.method.needs()
        missing = [key for key in _wanted(config) if key not in self._armed]
        if missing or (needs.vision is not None and self.vision is None):
            compiled.forget()
        if needs.vision is not None and self.vision is None:
            tap = runtime.family.vision_tap(runtime.model)
            runtime.before(tap.attention, self._enter_vision)
            for source in tap.sources:
                runtime.after(source, self._catch_vision)
            self.vision = tap
        for layer, state in missing:
            attention = runtime.family.attention(runtime.layers[layer])
            module = state_module(attention, state)
            if not any(at == layer for at, _ in self._armed):
                runtime.before(attention, partial(self._catch_rope, layer), nothing_in_a_step)
            hook, quick = (
                partial(self._catch_state, layer, state),
                partial(_no_state_in_a_step, attention, state),
            )
            runtime.after(module, hook, quick)
            self._armed[layer, state] = module

    def disarm(self) -> None:
        """The hooks are gone."""
        self._armed.clear()
        self.vision = None

    def check(self, config: PruneConfig) -> None:
        """Adapters put in or merged since: the hooks would see other states than the model uses, or none at all.

        Raises:
            TokenPruneError: modules were replaced.
        """
        if not _scores(config):
            return
        runtime = self.runtime
        replaced = any(
            state_module(runtime.family.attention(runtime.layers[layer]), state)
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

    def _catch_rope(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        frame = self._wanting(layer)
        if frame is not None:
            frame.forget_caught()
            frame.rope, frame.attention_module = kwargs["position_embeddings"], module

    def _catch_state(
        self, layer: int, state: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        """Score as soon as the last state a method needs is there; nothing but its selection is kept."""
        frame = self._wanting(layer)
        if frame is None:
            return
        needed = frame.config.method.needs().states
        if state not in needed:
            return
        frame.caught[state] = output
        if all(s in frame.caught for s in needed):
            self.select(frame, frame.stage, **frame.caught)
            frame.forget_caught()

    def _wanting(self, layer: int) -> Frame | None:
        """The call under way, if its next cut scores states of this layer."""
        frame = self.runtime.frame
        if frame is None or frame.pruning is None or frame.config.arguments.keep_lists is not None:
            return None
        cuts = frame.config.cuts
        return frame if frame.stage < len(cuts) and cuts[frame.stage].layer == layer + 1 else None

    def select(self, frame: Frame, cut: int, **states: Tensor) -> None:
        """Fill in the cut's selections from states (B, L', ...) of the whole sequence, where they are missing."""
        pruning, method = frame.pruning, frame.config.method
        assert pruning is not None
        if frame.config.arguments.keep_lists is not None:
            pruning.force(cut)
            return
        wanted = pruning.wants(cut)
        if not wanted:
            return
        needed = method.needs().states
        with torch.no_grad(), frame.scoring.running(next(iter(states.values())).device):
            for key in wanted:
                own = {
                    name: _state(frame, pruning, key, name, x) for name, x in states.items() if name in needed
                }
                image, k = pruning.view(key, frame.facts, **own), pruning.to_choose(cut, key)
                selection = method.select(image, k) if k else Selection(image.raster[:0])
                check_selection(method.name, selection, image.n, k)
                pruning.store(cut, key, selection)

    # -- the vision tower ---------------------------------------------------------------------------------------------

    def _enter_tower(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._towers.current = call = _TowerCall()
        config, frame = self._asking(), self.runtime.frame
        if self.vision is None or not _scores(config) or config.method.needs().vision is None:
            return
        sizes = None
        if self.vision.packed:  # once per call, before its layers
            _, given = self.runtime.family.tower_input(args, kwargs)
            sizes = sizes_on_host(given, [] if frame is None else frame.sizes)
        call.call = VisionCall(kwargs, {}, (), sizes)

    def _enter_vision(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tower = self._towers.current
        if tower is not None and tower.call is not None:
            tower.call = replace(tower.call, attention=kwargs)

    def _catch_vision(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Reduce each picture's attention to the floats the method wants, as soon as queries and keys are there."""
        tower, tap = self._towers.current, self.vision
        if tower is None or tower.call is None or tap is None:
            return
        tower.outputs[module] = output
        if len(tower.outputs) < len(tap.sources):
            return
        reduce = self._asking().method.needs().vision
        assert reduce is not None
        outputs = [tower.outputs[source] for source in tap.sources]
        with torch.no_grad():
            for parts in tap.read(replace(tower.call, outputs=outputs)):
                tower.attention.append(torch.cat([reduce(own) for own in parts]))
        tower.call, tower.outputs = None, {}

    def _leave_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tower, self._towers.current = self._towers.current, None
        if output is None or tower is None:  # it failed
            return
        config, frame, family = self._asking(), self.runtime.frame, self.runtime.family
        pixels, sizes = family.tower_input(args, kwargs)
        facts = VisionFacts(sizes, attention=tower.attention)
        if _scores(config) and config.method.needs().digest:
            facts.digests = family.digests(pixels, sizes)
        if frame is not None:
            for kind in [k for k in ("image", "video") if k in frame.kinds and k not in frame.facts][:1]:
                frame.facts[kind] = facts
        # Inside a call nobody reads them there, but what looks like one may have been left behind by an interrupt.
        attach_facts(output, facts)

    def _asking(self) -> PruneConfig:
        """The settings of the call under way, or of the one that generate() encodes images ahead of."""
        frame = self.runtime.frame
        return self.runtime.settings if frame is None else frame.config


def _scores(config: PruneConfig) -> bool:
    """Whether the method is asked at all."""
    return config.arguments.keep_lists is None and bool(config.cuts)


def _wanted(config: PruneConfig) -> list[tuple[int, str]]:
    """The layers and projected states that are scored."""
    projected = [s for s in config.method.needs().states if s != "hidden"]
    return [(cut.layer - 1, state) for cut in config.cuts for state in projected]


def _state(frame: Frame, pruning: Pruning, key: Key, name: str, x: Tensor) -> Tensor:
    """One image's states: (n, D) hidden, (n, heads, head_dim) otherwise, rotary applied."""
    states = x if name == "hidden" else by_token(frame.attention_module, name, x)
    own = pruning.take(states, key)
    if name in ("query", "key"):
        # With several devices the layer's inputs are moved only inside its forward.
        rope = frame.rope
        rope = pruning.take(rope, key) if isinstance(rope, Tensor) else [pruning.take(x, key) for x in rope]
        own = rotate(frame.attention_module, own, rope)
    # Never a view of the model's own states: a method that writes into what it is shown changes nothing else.
    return own.clone() if own.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else own


def _no_state_in_a_step(
    attention: nn.Module, state: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> Any:
    return None if by_token(attention, state, output).shape[1] == 1 else NotImplemented
