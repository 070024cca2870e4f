"""Hooks on the vision tower: which pictures it was given, and what methods want of its attention and its pixels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.config import PruneConfig
from tokenprune.errors import UnsupportedModelError
from tokenprune.methods.seen import Needs
from tokenprune.models.base import VisionCall, VisionTap
from tokenprune.runtime import compiled
from tokenprune.runtime.call import Call
from tokenprune.runtime.vision import VisionFacts, attach_facts, sizes_on_host
from tokenprune.runtime.wrapped import Wrapped
from tokenprune.tensors import as_written, split_over


@dataclass
class _TowerCall:
    """One call of the vision tower.

    Attributes:
        call: the call it belongs to; None where generate() encodes images ahead of one.
        config: what that call, or the one to come, is asked.
        seen: what was caught of it; None once it has been read, or where nobody asks.
        outputs: of the tap's sources so far, by their number.
        vision: what the method made of each picture's attention.
        caught: what that was made of.
    """

    call: Call | None
    config: PruneConfig
    seen: VisionCall | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    vision: list[Tensor] = field(default_factory=list)
    caught: VisionCall | None = None

    @property
    def needs(self) -> Needs:
        """The method's; nothing where nobody scores."""
        return self.config.needs if self.config.scores else Needs()

    @property
    def looks(self) -> bool:
        """Whether anybody wants the tower's attention."""
        return self.needs.vision is not None


class TowerTap:
    """Args:
    runtime: whose hooks they are.

    Attributes:
        tap: queries and keys of the layer that yields the features, once somebody wants them.
    """

    def __init__(self, runtime: Wrapped) -> None:
        self.runtime = runtime
        self.tap: VisionTap | None = None

    def install(self) -> None:
        # The features' grid is noted even when nobody scores: generate() encodes images ahead of the forward.
        tower = self.runtime.family.vision_tower()
        self.runtime.before(tower, self._enter_tower)
        self.runtime.after(tower, self._leave_tower, always=True)

    def arm(self, needs: Needs) -> None:
        """Register what a method needs and nobody needed before."""
        if needs.vision is None or self.tap is not None:
            return
        tap = self.runtime.family.vision_tap()
        if any(split_over(source) is not None for source in tap.sources):
            raise UnsupportedModelError(
                "the vision tower is split over several processes, and each would keep other tokens; give it no "
                "part in tp_plan, or use a method that does not look into it"
            )
        compiled.forget()
        self.runtime.before(tap.attention, self._enter_vision, follows=True)
        for i, source in enumerate(tap.sources):
            self.runtime.after(source, partial(self._catch_vision, i), follows=True)
        self.tap = tap

    def disarm(self) -> None:
        """The hooks are gone."""
        self.tap = None

    def _enter_tower(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # Not `runtime.call`: an interrupt may have left one behind that this is no part of.
        call = self.runtime.calls.running()
        tower = _TowerCall(call, self.runtime.settings if call is None else call.config)
        self.runtime.calls.enter_tower(tower)
        if not tower.looks or self.tap is None:
            return
        self.runtime.follow()  # here, too: generate() encodes pictures ahead of the call
        sizes = None
        if self.tap.packed:  # once per call, before its layers
            _, given = self.runtime.family.tower_input(args, kwargs)
            sizes = sizes_on_host(given, [] if call is None else call.sizes)
        tower.seen = VisionCall(kwargs, {}, (), sizes)

    def _enter_vision(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tower = self._current
        if tower is not None and tower.seen is not None and tower.looks:
            tower.seen = replace(tower.seen, attention=kwargs)

    def _catch_vision(self, i: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Reduce each picture's attention to the floats the method wants, as soon as queries and keys are there."""
        tower = self._current
        if tower is None or tower.seen is None or self.tap is None or not tower.looks:
            return
        tower.outputs[i] = output
        if len(tower.outputs) == len(self.tap.sources):
            outputs = [tower.outputs[source] for source in range(len(self.tap.sources))]
            self._reduce(tower, replace(tower.seen, outputs=outputs))

    def _reduce(self, tower: _TowerCall, caught: VisionCall) -> None:
        reduce = tower.needs.vision
        assert reduce is not None and self.tap is not None
        with as_written(caught.outputs[0].device):
            for parts in self.tap.read(caught):
                tower.vision.append(torch.cat([reduce(own) for own in parts]))
        tower.seen, tower.outputs, tower.caught = None, {}, caught

    @property
    def caught(self) -> VisionCall | None:
        """What was caught of the tower's call under way in this thread, for a `replay` of the same call."""
        return None if self._current is None else self._current.caught

    def replay(self, caught: VisionCall) -> None:
        """Inside a call of the tower whose output is known: what was caught of it then, instead of computing it."""
        tower = self._current
        if tower is not None and tower.needs.vision is not None:
            self._reduce(tower, caught)

    def _leave_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tower = self._current
        self.runtime.calls.leave_tower()
        if output is None or tower is None:  # it failed
            return
        needs, call, family = tower.needs, tower.call, self.runtime.family
        pixels, sizes = family.tower_input(args, kwargs)
        method = tower.config.method if tower.config.scores else None
        facts = VisionFacts(sizes, method, needs.pixels, vision=tower.vision)
        if needs.digest:
            facts.digests = family.digests(pixels, sizes)
        if needs.pixels is not None:
            host = sizes_on_host(sizes, [] if call is None else call.sizes)
            with as_written(pixels.device):
                facts.pixels = [needs.pixels(family.eight_bit(own)) for own in family.patches(pixels, host)]
        if call is not None:
            for kind in [k for k in ("image", "video") if k in call.kinds and k not in call.facts][:1]:
                call.facts[kind] = facts
        # Inside a call nobody reads them there, but what looks like one may have been left behind by an interrupt.
        attach_facts(output, facts)

    @property
    def _current(self) -> _TowerCall | None:
        tower = self.runtime.calls.tower
        assert tower is None or isinstance(tower, _TowerCall)
        return tower
