"""From what was asked to what a wrapped model does: filled in, and checked against the model before it is touched."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from tokenprune.arguments import Arguments
from tokenprune.auto import resolve
from tokenprune.budget import Cut
from tokenprune.config import PruneConfig
from tokenprune.errors import BudgetError, ConfigError, UnsupportedModelError
from tokenprune.fingerprint import fingerprint
from tokenprune.methods import Method, NoPruning, ScoreMethod, make_method
from tokenprune.methods.seen import PROJECTED, Needs
from tokenprune.methods.staged import Staged
from tokenprune.models.base import Family
from tokenprune.models.decoders import attention_backend, check_states, takes_biases


def settle(family: Family, asked: Arguments, *, known: bool = False) -> PruneConfig:
    """Fill in what is left open, and check it all against the family's model.

    Args:
        family: of the model.
        asked: by the user.
        known: whether its profile was found to be the model's before.

    Raises:
        ConfigError: names the argument and what it may be.
        UnsupportedModelError: a method needs what this model does not offer.
    """
    own = _Settling(family)
    if not known:
        own.check_profile(asked)
    arguments, note = resolve(family, asked, lambda: own.identity)
    method = own.method(arguments)
    own.check(arguments, method)
    if isinstance(method, NoPruning):
        return PruneConfig(asked, arguments, method, (), "nothing is cut")
    cuts, reason = own.cuts(arguments, method)
    own.check_cuts(arguments, method, cuts)
    return PruneConfig(asked, arguments, method, cuts, reason + note)


class _Settling:
    """What arguments are checked against.

    Args:
        family: of the model.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.shape = family.decoder_shape()
        self.num_layers, self.attending = self.shape.num_layers, family.attending()
        self.text_config: Any = family.text_model().config

    @cached_property
    def identity(self) -> str:
        """The model's fingerprint; it reads every parameter, so once, and only if asked for."""
        return fingerprint(self.family.model)

    def check_profile(self, arguments: Arguments) -> None:
        """Refuse a profile that was made for another model.

        Raises:
            ConfigError: names both models.
        """
        profile = arguments.profile
        if profile is not None and not arguments.allow_mismatch and profile.model != self.identity:
            made = f"the model {profile.model}" if profile.model else "no model in particular"
            raise ConfigError(
                f"the profile was made for {made}, and this one is {self.identity}; tune one for it, or pass "
                f"allow_mismatch=True"
            )

    def method(self, arguments: Arguments) -> Method:
        """The method, or its stages as one, each of which the model offers what it needs."""
        stages: Any = arguments.stages  # made Stages by Arguments
        each = [make_method(own.method, dict(own.parameters)) for own in stages or (arguments,)]
        made = each[0] if stages is None else Staged(tuple(each))
        made.check(self.shape)
        for own in each:
            self._check_needs(own)
        if arguments.frame_floor and not all(isinstance(own, ScoreMethod) for own in each):
            raise ConfigError(
                f"frame_floor needs a method that scores tokens; {made.name!r} does not: leave it out"
            )
        return made

    def _check_needs(self, method: Method) -> None:
        needs, text = method.needs(), self.text_config
        unknown = {*needs.states, *needs.prompt} - {*PROJECTED, "hidden"}
        if unknown:
            names = ", ".join(sorted(map(repr, unknown)))
            raise ConfigError(
                f"method {method.name!r} needs the states {names}; there are query, key, value and hidden"
            )
        if needs.projected:
            check_states(text)
        if needs.vision is not None:
            self.family.vision_tap()
        if needs.pixels is not None:
            self.family.pixel_scale()
        if needs.bias and not takes_biases(text):
            raise ConfigError(
                f"method {method.name!r} adds biases to attention, which {attention_backend(text)} does not take; load "
                f"the model with attn_implementation='sdpa' or 'eager', or ask for no bias (vflowopt: size_term=False)"
            )
        if self.family.on_trial and (needs.merges or needs.bias):
            raise UnsupportedModelError(
                f"method {method.name!r} merges tokens or adds biases, and a model of no known family is tried by what "
                f"is dropped alone; take a method that only drops (uniform, entropyprune, fastv)"
            )
        if needs.counts and type(method).count is Method.count:
            raise ConfigError(
                f"method {method.name!r} says counts and has no `count`; see tokenprune.methods.Method"
            )

    def check(self, arguments: Arguments, method: Method) -> None:
        """What goes together, wherever it is cut."""
        needs = method.needs()
        if arguments.allocation == "pooled" and needs.merges:
            raise ConfigError(
                f"method {method.name!r} merges tokens, which allocation='pooled' does not offer; use "
                f"allocation='image'"
            )
        if arguments.keep is None and (arguments.text_floor is not None or arguments.escalate is not None):
            raise ConfigError("text_floor and escalate raise a budget: say keep, as a share")
        if arguments.settles_per_picture:
            if arguments.reads_pixels:
                self.family.pixel_scale()
            if needs.counts:
                raise ConfigError(f"method {method.name!r} settles counts itself: give it a plain keep")
        if isinstance(method, NoPruning) and arguments.says_how_much:
            raise ConfigError("method 'none' keeps everything: leave keep, cuts and keep_lists out")

    def cuts(self, arguments: Arguments, method: Method) -> tuple[tuple[Cut, ...], str]:
        """The cuts, and where their layers came from."""
        if arguments.stages is not None:
            stages: Any = arguments.stages
            return tuple(Cut(own.layer, own.keep) for own in stages), "given"
        if arguments.cuts is not None:
            return tuple(arguments.cuts), "given"  # type: ignore[arg-type]  # made Cuts by Arguments
        if arguments.layer is None:
            cuts, reason = method.default_cuts(self.family.name, self.num_layers, arguments.keep)
            return self._after_attention(cuts, reason, method.needs())
        if arguments.layer != "auto":
            return (Cut(arguments.layer),), "given"
        from tokenprune.profiles.collapse import detected_layer  # pydantic is not needed otherwise

        found = detected_layer(self.identity)
        return (Cut(found.layer),), f"{found.source} on {found.images} images by {found.estimator}"

    def _after_attention(
        self, cuts: tuple[Cut, ...], reason: str, needs: Needs
    ) -> tuple[tuple[Cut, ...], str]:
        """The cuts, those of a method that scores states behind the next layer that has them."""
        if not needs.projected or needs.ahead is not None:
            return cuts, reason
        behind = [i + 1 for i in self.attending]
        moved = tuple(
            replace(cut, layer=min((i for i in behind if i >= cut.layer), default=cut.layer)) for cut in cuts
        )
        return moved, reason if moved == cuts else f"{reason}, behind the next layer that attends"

    def check_cuts(self, arguments: Arguments, method: Method, cuts: tuple[Cut, ...]) -> None:
        """Whether each can be made, and every token count follows from the arguments, once."""
        for number, cut in enumerate(cuts):
            self._check_layer(cut.layer, method.at(number))
        lists, keep = arguments.keep_lists, arguments.keep
        if lists is not None:
            if len(lists) != len(cuts):
                raise ConfigError(f"keep_lists has {len(lists)} cuts, but the model is cut {len(cuts)} times")
        elif cuts[-1].keep is None:
            if keep is None:
                raise ConfigError(
                    "say how much to keep, for example keep=0.25 (a fraction) or keep=144 (tokens)"
                )
            self._check_average(arguments, cuts)
        elif keep is not None:
            raise ConfigError("every cut says its own keep; leave the overall keep out, or the last cut's")
        if arguments.positions == "compact" and (self.family.mrope or any(cut.layer for cut in cuts)):
            raise ConfigError(
                f"positions='compact' is offered for cuts before the LLM (layer=0) of models with one position per "
                f"token; here the cuts are at {', '.join(str(c.layer) for c in cuts)} of a {self.family.name} model: "
                f"use 'keep'"
            )

    def _check_layer(self, layer: object, method: Method) -> None:
        # Queries, keys and values are those of the layer before the cut.
        needs, last = method.needs(), self.num_layers - 1
        if needs.ahead is not None:
            if layer != 0 or needs.ahead > last:
                raise ConfigError(
                    f"looking ahead goes with a cut before the LLM (layer=0) and at most {last} layers of this model, "
                    f"not with layer={layer!r} and {needs.ahead} layers"
                )
            self._check_attends(needs, needs.ahead, "look {} layers ahead")
            return
        lowest = max(method.min_layer, int(bool(needs.projected)))
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ConfigError(f"layer must be an int from {lowest} to {last}, or 'auto', not {layer!r}")
        if not lowest <= layer <= last:
            why = ": it scores states of the layer before the cut" if layer == 0 else ""
            raise ConfigError(
                f"method {method.name!r} can cut this model at layers {lowest} to {last}, not {layer}{why}"
            )
        self._check_attends(needs, layer, "cut at {}")

    def _check_attends(self, needs: Needs, layer: int, how: str) -> None:
        if needs.projected and layer - 1 not in self.attending:
            places = ", ".join(str(i + 1) for i in self.attending)
            raise ConfigError(
                f"queries, keys and values of layer {layer - 1} are wanted, which has none: only layers "
                f"{', '.join(map(str, self.attending))} of this model attend; {how.format(places)}"
            )

    def _check_average(self, arguments: Arguments, cuts: tuple[Cut, ...]) -> None:
        """A fraction no image size can reach is refused now; the rest is known once the image is."""
        keep: Any = arguments.keep
        counts = isinstance(keep, int) or any(isinstance(cut.keep, int) for cut in cuts)
        if arguments.meaning != "average" or counts:
            return
        spent, previous, start = 0.0, 1.0, 0  # in layers times shares
        for cut in cuts:
            spent += (cut.layer - start) * previous
            start, previous = cut.layer, previous if cut.keep is None else float(cut.keep)
        low, high = (
            share / self.num_layers for share in (spent, spent + (self.num_layers - start) * previous)
        )
        if low < keep <= high + 1e-9:
            return
        layers = ", ".join(str(cut.layer) for cut in cuts)
        where = f"a cut at layer {start}" if len(cuts) == 1 else f"cuts at {layers}"
        ends = "" if high > 1 - 1e-9 else f" and ends at {high:.1%}"
        raise BudgetError(
            f"an average of {keep:.1%} cannot be reached by {where} of {self.num_layers}: the reachable range starts "
            f"above {low:.1%}{ends}; cut earlier, keep more, or use budget='after_cut'"
        )
