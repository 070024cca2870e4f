"""What a wrapped model does at each call: `Arguments`, checked against the model and settled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.arguments import Arguments
from tokenprune.auto import resolve
from tokenprune.budget import BudgetMeaning, Cut, Keep
from tokenprune.errors import BudgetError, ConfigError, UnsupportedModelError
from tokenprune.fingerprint import fingerprint
from tokenprune.methods import DecoderShape, Method, NoPruning, ScoreMethod, make_method
from tokenprune.methods.importance import grey_entropy
from tokenprune.methods.seen import PROJECTED, Needs
from tokenprune.methods.staged import Staged
from tokenprune.models.base import Family
from tokenprune.models.decoders import attention_backend, check_states, takes_biases
from tokenprune.printed import COLUMNS, look


@dataclass(frozen=True)
class PruneConfig:
    """Attributes:
    asked: what was asked, for an `override` to start from.
    arguments: the same once a profile, and what "auto" stands for, are filled in.
    method: the pruning method.
    cuts: where to prune, ascending; empty for `none`.
    layer_reason: where the cut's layer came from, for the report.
    rows_at: budgets of their own, by row of the batch; see `escalate.py`.
    """

    asked: Arguments
    arguments: Arguments
    method: Method
    cuts: tuple[Cut, ...]
    layer_reason: str
    rows_at: Mapping[int, float] = field(default_factory=dict)

    @cached_property
    def needs(self) -> Needs:
        """Of all cuts, and of an adaptive budget, asked once: hooks look at them."""
        needs, adaptive = self.method.needs(), self.arguments.adaptive_keep
        if not self.scores:
            return needs
        if adaptive is not None and not adaptive.reads_pixels:
            needs = replace(needs, features=True)
        if self.arguments.reads_pixels:
            needs = replace(needs, pixels=Beside(needs.pixels))
        return needs

    def needs_at(self, cut: int) -> Needs:
        """What is wanted at a cut."""
        return self._needs[min(cut, len(self._needs) - 1)]

    @cached_property
    def _needs(self) -> list[Needs]:
        return [self.method.at(cut).needs() for cut in range(len(self.cuts) or 1)]

    def cuts_by(self, layers: int) -> list[int]:
        """How many cuts have been made on entering each of so many layers, that layer's own included."""
        found, made = [], 0
        for i in range(layers):
            while made < len(self.cuts) and self.cuts[made].layer <= i:
                made += 1
            found.append(made)
        return found

    def described(self) -> str:
        """On one line, for logs: method, cuts and where they came from, budget, profile."""
        where = ", ".join(str(cut.layer) for cut in self.cuts) or "none"
        profile = self.arguments.profile
        known = "" if profile is None else f", profile {profile.hash[:8]} for {profile.keep}"
        return (
            f"{self.method.name}, cuts at layers {where} ({self.layer_reason}), keep {self.arguments.keep} "
            f"({self.arguments.meaning}){known}"
        )

    @property
    def scores(self) -> bool:
        """Whether the method is asked at all."""
        return self.arguments.keep_lists is None and bool(self.cuts)


@dataclass(frozen=True)
class Beside:
    """What a method reads of pixels, if anything, and behind it what budgets do: print, and grey-level entropy."""

    own: Callable[[Tensor], Tensor] | None

    def __call__(self, patches: Tensor) -> Tensor:
        columns = [] if self.own is None else [self.own(patches)]
        columns += [look(patches), grey_entropy(patches)]
        return torch.cat([c.reshape(len(patches), -1).float() for c in columns], dim=1)

    @staticmethod
    def grey(noted: Tensor) -> Tensor:
        """(n,) of (n, c)."""
        return noted[:, -1]

    @staticmethod
    def looked(noted: Tensor) -> Tensor:
        """(n, COLUMNS) of (n, c)."""
        return noted[:, -1 - COLUMNS : -1]

    def for_method(self, noted: Tensor) -> Tensor | None:
        """What the method asked for itself: (n,) or (n, c)."""
        rest = noted[:, : -1 - COLUMNS]
        return None if self.own is None else rest[:, 0] if rest.shape[1] == 1 else rest


def settle(family: Family, asked: Arguments, *, known: bool = False) -> PruneConfig:
    """Fill in what is left open, and check it all against the family's model, before anything is touched.

    Args:
        family: of the model.
        asked: by the user.
        known: whether its profile was found to be the model's before.

    Raises:
        ConfigError: names the argument and what it may be.
    """
    num_layers = len(family.layers())
    identify = cache(partial(fingerprint, family.model))  # reads every parameter: once, and only if asked for
    if not known:
        _check_profile(identify, asked)
    arguments, note = resolve(family, asked, identify)
    stages: Any = arguments.stages  # made Stages by Arguments
    asked_for = [arguments] if stages is None else stages
    each = [make_method(own.method, dict(own.parameters)) for own in asked_for]
    made = each[0] if stages is None else Staged(tuple(each))
    made.check(decoder_shape(family))
    for own in each:
        _check_needs(family, own)
    if arguments.frame_floor and not all(isinstance(own, ScoreMethod) for own in each):
        raise ConfigError(
            f"frame_floor needs a method that scores tokens; {made.name!r} does not: leave it out"
        )
    if arguments.allocation == "pooled" and made.needs().merges:
        raise ConfigError(
            f"method {made.name!r} merges tokens, which allocation='pooled' does not offer; use allocation='image'"
        )
    if arguments.keep is None and (arguments.text_floor is not None or arguments.escalate is not None):
        raise ConfigError("text_floor and escalate raise a budget: say keep, as a share")
    if arguments.settles_per_picture:
        _check_adaptive(family, arguments, made)
    if isinstance(made, NoPruning):
        if arguments.says_how_much:
            raise ConfigError("method 'none' keeps everything: leave keep, cuts and keep_lists out")
        return PruneConfig(asked, arguments, made, (), "nothing is cut")
    cuts, reason = _cuts(family, arguments, made, identify)
    reason += note
    for number, cut in enumerate(cuts):
        _check_layer(cut.layer, num_layers, made.at(number), family.attending())
    _check_budget(arguments, cuts, num_layers)
    if arguments.positions == "compact" and (family.mrope or any(cut.layer for cut in cuts)):
        raise ConfigError(
            f"positions='compact' is offered for cuts before the LLM (layer=0) of models with one position per token; "
            f"here the cuts are at {', '.join(str(c.layer) for c in cuts)} of a {family.name} model: use 'keep'"
        )
    return PruneConfig(asked, arguments, made, cuts, reason)


def _check_adaptive(family: Family, arguments: Arguments, method: Method) -> None:
    """Refuse what an adaptive budget, or a floor for text, cannot be read off, or met by.

    Raises:
        UnsupportedModelError: the family does not offer pixels.
        ConfigError: the method has a say in the counts itself.
    """
    if arguments.reads_pixels:
        family.pixel_scale()
    if method.needs().counts:
        raise ConfigError(f"method {method.name!r} settles counts itself: give it a plain keep")


def _check_profile(identify: Callable[[], str], arguments: Arguments) -> None:
    """Refuse a profile that was made for another model. Asked when one is given, not at every `override`.

    Raises:
        ConfigError: names both models.
    """
    profile = arguments.profile
    if profile is None or arguments.allow_mismatch:
        return
    own = identify()
    if profile.model != own:
        made = f"the model {profile.model}" if profile.model else "no model in particular"
        raise ConfigError(
            f"the profile was made for {made}, and this one is {own}; tune one for it, or pass allow_mismatch=True"
        )


def _check_needs(family: Family, method: Method) -> None:
    """Refuse what the family or its text model has not, by name.

    Raises:
        ConfigError: a method asks for something unknown.
        UnsupportedModelError: something that this model does not offer.
    """
    needs, text = method.needs(), family.text_model().config
    unknown = {*needs.states, *needs.prompt} - {*PROJECTED, "hidden"}
    if unknown:
        names = ", ".join(sorted(map(repr, unknown)))
        raise ConfigError(
            f"method {method.name!r} needs the states {names}; there are query, key, value and hidden"
        )
    if needs.projected:
        check_states(text)
    if needs.vision is not None:
        family.vision_tap()
    if needs.pixels is not None:
        family.pixel_scale()
    if needs.bias and not takes_biases(text):
        raise ConfigError(
            f"method {method.name!r} adds biases to attention, which {attention_backend(text)} does not take; load the "
            f"model with attn_implementation='sdpa' or 'eager', or ask for no bias (vflowopt: size_term=False)"
        )
    if family.on_trial and (needs.merges or needs.bias):
        raise UnsupportedModelError(
            f"method {method.name!r} merges tokens or adds biases, and a model of no known family is tried by what is "
            f"dropped alone; take a method that only drops (uniform, entropyprune, fastv)"
        )
    if needs.counts and type(method).count is Method.count:
        raise ConfigError(
            f"method {method.name!r} says counts and has no `count`; see tokenprune.methods.Method"
        )


def _cuts(
    family: Family, arguments: Arguments, method: Method, identify: Callable[[], str]
) -> tuple[tuple[Cut, ...], str]:
    """The cuts, and where their layers came from."""
    if arguments.stages is not None:
        stages: Any = arguments.stages  # made Stages by Arguments
        return tuple(Cut(own.layer, own.keep) for own in stages), "given"
    if arguments.cuts is not None:
        return tuple(arguments.cuts), "given"  # type: ignore[arg-type]  # made Cuts by Arguments
    if arguments.layer is None:
        cuts, reason = method.default_cuts(family.name, len(family.layers()), arguments.keep)
        return _after_attention(cuts, reason, method, family.attending())
    if arguments.layer == "auto":
        layer, reason = _detected_layer(identify())
    else:
        layer, reason = arguments.layer, "given"
    return (Cut(layer),), reason


def _after_attention(
    cuts: tuple[Cut, ...], reason: str, method: Method, attending: Sequence[int]
) -> tuple[tuple[Cut, ...], str]:
    """The cuts, those of a method that scores states behind the next layer that has them."""
    needs = method.needs()
    if not needs.projected or needs.ahead is not None:
        return cuts, reason
    places = [min((i + 1 for i in attending if i + 1 >= cut.layer), default=cut.layer) for cut in cuts]
    moved = tuple(replace(cut, layer=place) for cut, place in zip(cuts, places, strict=True))
    return moved, reason if moved == cuts else f"{reason}, behind the next layer that attends"


def _check_budget(arguments: Arguments, cuts: tuple[Cut, ...], num_layers: int) -> None:
    """Every token count must follow from the arguments, once."""
    lists, keep = arguments.keep_lists, arguments.keep
    if lists is not None:
        if len(lists) != len(cuts):
            raise ConfigError(f"keep_lists has {len(lists)} cuts, but the model is cut {len(cuts)} times")
    elif cuts[-1].keep is None:
        if keep is None:
            raise ConfigError("say how much to keep, for example keep=0.25 (a fraction) or keep=144 (tokens)")
        _check_average(keep, cuts, num_layers, arguments.meaning)
    elif keep is not None:
        raise ConfigError("every cut says its own keep; leave the overall keep out, or the last cut's")


def decoder_shape(family: Family) -> DecoderShape:
    text: Any = family.text_model().config
    heads = text.num_attention_heads
    attention: Any = family.attention(family.layers()[family.attending()[0]])
    return DecoderShape(
        num_layers=len(family.layers()),
        num_heads=heads,
        num_key_value_heads=heads // getattr(attention, "num_key_value_groups", 1),
        head_dim=int(getattr(attention, "head_dim", None) or attention.qk_head_dim),  # latent attention
        hidden_size=text.hidden_size,
    )


def _check_layer(layer: object, num_layers: int, method: Method, attending: Sequence[int]) -> None:
    # Queries, keys and values are those of the layer before the cut.
    needs = method.needs()
    if needs.ahead is not None:
        if layer != 0 or needs.ahead >= num_layers:
            raise ConfigError(
                f"looking ahead goes with a cut before the LLM (layer=0) and at most {num_layers - 1} layers of this "
                f"model, not with layer={layer!r} and {needs.ahead} layers"
            )
        _check_attends(needs, needs.ahead, attending, "look {} layers ahead")
        return
    lowest = max(method.min_layer, int(bool(needs.projected)))
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ConfigError(f"layer must be an int from {lowest} to {num_layers - 1}, or 'auto', not {layer!r}")
    if not lowest <= layer < num_layers:
        why = ": it scores states of the layer before the cut" if layer == 0 else ""
        raise ConfigError(
            f"method {method.name!r} can cut this model at layers {lowest} to "
            f"{num_layers - 1}, not {layer}{why}"
        )

    _check_attends(needs, layer, attending, "cut at {}")


def _check_attends(needs: Needs, layer: int, attending: Sequence[int], how: str) -> None:
    if needs.projected and layer - 1 not in attending:
        places = ", ".join(str(i + 1) for i in attending)
        raise ConfigError(
            f"queries, keys and values of layer {layer - 1} are wanted, which has none: only layers "
            f"{', '.join(map(str, attending))} of this model attend; {how.format(places)}"
        )


def _detected_layer(own: str) -> tuple[int, str]:
    from tokenprune.profiles.collapse import detected_layer  # pydantic is not needed otherwise

    found = detected_layer(own)
    return found.layer, f"{found.source} on {found.images} images by {found.estimator}"


def _check_average(keep: Keep, cuts: tuple[Cut, ...], num_layers: int, budget: BudgetMeaning) -> None:
    """A fraction no image size can reach is refused now; the rest is known once the image is."""
    if budget != "average" or isinstance(keep, int) or any(isinstance(cut.keep, int) for cut in cuts):
        return
    spent, previous, start = 0.0, 1.0, 0  # in layers times shares
    for cut in cuts:
        spent += (cut.layer - start) * previous
        start, previous = cut.layer, previous if cut.keep is None else float(cut.keep)
    low, high = spent / num_layers, (spent + (num_layers - start) * previous) / num_layers
    if low < keep <= high + 1e-9:
        return
    where = (
        f"a cut at layer {start}" if len(cuts) == 1 else f"cuts at {', '.join(str(c.layer) for c in cuts)}"
    )
    ends = "" if high > 1 - 1e-9 else f" and ends at {high:.1%}"
    raise BudgetError(
        f"an average of {keep:.1%} cannot be reached by {where} of {num_layers}: the reachable range starts above "
        f"{low:.1%}{ends}; cut earlier, keep more, or use budget='after_cut'"
    )
