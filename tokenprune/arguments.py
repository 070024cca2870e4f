"""Everything `wrap` takes, once: names, defaults, the checks that need no model, and how a text is read.

`wrap`, `pruned`, `override`, the command line and evaluations are made from `Arguments`; an argument is added here.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenprune.adaptive import Adaptive
from tokenprune.budget import BudgetMeaning, Cut, Escalate, Keep, check_keep
from tokenprune.errors import ConfigError
from tokenprune.methods import Method, find_method
from tokenprune.models.base import Family

if TYPE_CHECKING:
    from tokenprune.profiles.profile import Profile

Positions = Literal["keep", "compact"]
Allocation = Literal["image", "pooled"]
AUTO = "auto"
# What "auto" is where no profile is known of a model: what won on every model it was tried on.
DEFAULT = "vflowopt"
# keep_lists[cut][row][image] = kept raster indices
KeepLists = Sequence[Sequence[Sequence[Any]]]


@dataclass(frozen=True)
class Stage:
    """A cut with a method of its own.

    Attributes:
        layer: it is made on entering this decoder layer; 0 is before the LLM.
        method: a name, or a `Method`.
        keep: a share of the image's original tokens, or a number; None, of the last: solved from the budget.
        parameters: of the method.
    """

    layer: int
    method: str | Method
    keep: Keep | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arguments:
    """What is asked of a wrapped model, as it was asked; `tokenprune.settle.settle` says what becomes of it.

    Attributes:
        method: a name from `tokenprune methods`, or a `Method` of your own. "auto" (default) takes the profile known
            for this model whose budget is nearest from above, solved for the budget asked; where none is known, or
            where layers or parameters are given, it is "vflowopt" with its defaults (where that cannot look into the
            model's vision tower, "uniform" before the LLM).
        keep: how many visual tokens to keep: a float in (0, 1] is a fraction, an int a number per image, an `Adaptive`
            one that follows each picture around its mean.
        layer: prune on entering this decoder layer; 0 is before the LLM. Default: the method's own cuts.
            "auto": the one `detect_ecl` found for this model.
        cuts: several cuts instead of `layer`: (layer, keep) pairs, each keep a share of the image's original
            tokens; leave the last one's keep None to have it solved from the budget.
        stages: cuts that each have a method of their own, instead of `method`, `layer` and `cuts`: `Stage`s, or (layer,
            method, keep) and, where it has any, a mapping of the method's parameters.
        budget: what `keep` means: "average" over the decoder layers (as papers count), or "after_cut". Default: what
            the profile says, else "average".
        positions: "keep" the original position ids, or "compact" them (cuts before the LLM with 1-D RoPE only).
        strict: raise instead of warning when a call prunes nothing although the budget asked for it.
        keep_lists: force what is kept: `keep_lists[cut][row][image]` are ascending raster indices.
        allocation: "image": every image has a budget of its own; "pooled": a prompt's images share the sum of theirs.
        frame_floor: tokens that every frame of a video, and every view of an image, keeps at least.
        compact_early: after the prompt, take what was dropped out of the cache of the layers before the last cut, too:
            the whole cache shrinks, and answers no longer see in early layers what later ones have dropped. Layer 0
            stays whole, and so do caches that are quantised or hold a window.
        family: a subclass of `Family` of your own, or the name of another of ours, for a model that is not known or
            that has a known model's parts; fixed when the model is wrapped.
        profile: a `Profile` or the path of one: its method, parameters, cuts and budget are taken, but for what is
            given beside it (another `keep` is solved anew).
        allow_mismatch: take a profile that was made for another model.
        escalate: (keep, entropy): rows whose first token has more entropy than that, in nats, are prefilled again with
            this larger share; see `Escalate`, and `calibrate_escalation`. First turns, growing caches.
        text_floor: share that a picture of dense print (page, table, screenshot) keeps at least; see `printed.py`.
        adaptive_keep: the `Adaptive` that was given as `keep`.
        parameters: of the method.

    Raises:
        ConfigError: names the argument and what it may be.
    """

    method: str | Method = AUTO
    keep: Keep | None = None  # or an Adaptive, whose mean it is once made
    layer: int | Literal["auto"] | None = None
    cuts: Sequence[Cut | tuple[int, Keep | None]] | None = None
    stages: Sequence[Stage | tuple[Any, ...]] | None = None
    budget: BudgetMeaning | None = None
    positions: Positions = "keep"
    strict: bool = False
    keep_lists: KeepLists | None = None
    allocation: Allocation = "image"
    frame_floor: int = 0
    compact_early: bool = False
    family: str | type[Family] | None = None
    profile: Any = None
    allow_mismatch: bool = False
    escalate: Escalate | None = None  # or (keep, entropy)
    text_floor: float | None = None
    adaptive_keep: Adaptive | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.budget is not None:
            _one_of("budget", self.budget, ("average", "after_cut"))
        _one_of("positions", self.positions, ("keep", "compact"))
        _one_of("allocation", self.allocation, ("image", "pooled"))
        if (
            isinstance(self.frame_floor, bool)
            or not isinstance(self.frame_floor, int)
            or self.frame_floor < 0
        ):
            raise ConfigError(f"frame_floor must be a number of tokens, 0 or more, not {self.frame_floor!r}")
        for name in ("strict", "compact_early"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.method == "none" and self.says_how_much:
            raise ConfigError("method 'none' keeps everything: leave keep, cuts and keep_lists out")
        given: Any = self.keep
        if isinstance(given, Adaptive):
            object.__setattr__(self, "adaptive_keep", given)
            object.__setattr__(self, "keep", given.mean)
        if self.keep is not None:
            object.__setattr__(self, "keep", check_keep(self.keep))
        if self.cuts is not None and self.layer is not None:
            raise ConfigError("pass layer or cuts, not both")
        if self.cuts is not None:
            object.__setattr__(self, "cuts", check_cuts(self.cuts))
        if self.stages is not None:
            beside = [name for name in ("layer", "cuts") if getattr(self, name) is not None]
            beside += ["method"] if self.method != AUTO else list(self.parameters)
            if beside:
                raise ConfigError(
                    f"stages say methods, parameters and layers themselves: leave {beside[0]} out"
                )
            object.__setattr__(self, "stages", check_stages(self.stages))
        if self.adaptive_keep is not None:
            _check_adaptive(self)
        if self.text_floor is not None:
            _check_floor(self)
        if self.escalate is not None:
            object.__setattr__(self, "escalate", _check_escalate(self))
        if self.keep_lists is not None and not is_list(self.keep_lists):
            raise ConfigError(
                f"keep_lists must be keep_lists[cut][row][image] = kept raster indices, not {self.keep_lists!r}"
            )

    @property
    def says_how_much(self) -> bool:
        """Whether anything is to be dropped."""
        return any(given is not None for given in (self.keep, self.cuts, self.stages, self.keep_lists))

    @property
    def settles_per_picture(self) -> bool:
        """Whether how much of a picture stays depends on what it shows."""
        return self.adaptive_keep is not None or self.text_floor is not None

    @property
    def reads_pixels(self) -> bool:
        """Whether it depends on its pixels."""
        return self.text_floor is not None or (
            self.adaptive_keep is not None and self.adaptive_keep.reads_pixels
        )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """From keyword arguments as `wrap` takes them: names that are none of ours are the method's parameters."""
        given = _with_profile(given)
        own = {name: value for name, value in given.items() if name in NAMES}
        return cls(**own, parameters={name: value for name, value in given.items() if name not in NAMES})

    def changed(self, changes: Mapping[str, Any]) -> Arguments:
        """These arguments after an `override`.

        A new method starts from its own default parameters; a new profile replaces method, cuts and budget. A new
        `layer` replaces `cuts` and the other way round. Method "none", and cuts that all say their own keep, need no
        `keep=None` beside them.
        """
        if "family" in changes:
            raise ConfigError("family is fixed when a model is wrapped; unwrap it first")
        changes = _with_profile(changes)
        new = {name: value for name, value in changes.items() if name in NAMES}
        own = {name: value for name, value in changes.items() if name not in NAMES}
        gone: set[str] = set()
        if new.get("profile") is not None:
            gone |= {"keep", "layer", "cuts", "budget", "keep_lists"}
            new.setdefault("method", AUTO)
        elif "method" in changes and self.profile is not None:
            gone.add("profile")
            if self.keep is None and self.cuts is None and changes["method"] != "none":
                new = {"keep": self.profile.keep, "budget": self.profile.budget, **new}  # at the same budget
        elif "method" not in changes:
            own = {**self.parameters, **own}
        if changes.keys() & {"method", "profile", "layer", "cuts"}:
            gone.add("stages")
        if changes.get("stages") is not None:
            gone, own = gone | {"layer", "cuts", "profile"}, {}
            new.setdefault("method", AUTO)
            if check_stages(new["stages"])[-1].keep is not None:
                gone.add("keep")
        if "layer" in changes:
            gone.add("cuts")
        if "cuts" in changes:
            gone.add("layer")
            if new["cuts"] is not None:
                new["cuts"] = check_cuts(new["cuts"])
                if new["cuts"][-1].keep is not None:
                    gone.add("keep")
        if changes.get("method") == AUTO:
            gone |= {"layer", "cuts", "keep_lists"} - changes.keys()
        if changes.get("method") == "none":
            gone |= {"keep", "layer", "cuts", "keep_lists"}
        if {"layer", "cuts", "stages", "keep"} & changes.keys():
            gone.add("keep_lists")
        if {"keep", "profile"} & changes.keys() or changes.get("method") == "none":
            gone.add("adaptive_keep")
        if (
            changes.keys() & {"keep", "profile", "allocation", "keep_lists"}
            or changes.get("method") == "none"
        ):
            gone |= {"escalate", "text_floor"}
        replaced: dict[str, Any] = {**dict.fromkeys(gone), "parameters": own, **new}
        return dataclasses.replace(self, **replaced)

    def under(self, profile: Profile) -> Arguments:
        """With what a profile says, but for what is asked beside it.

        Raises:
            ConfigError: the profile is for another method, or holds what its method does not take.
        """
        if self.stages is not None:
            raise ConfigError("stages and a profile say the same things: leave one of them out")
        if profile.stages and (self.method != AUTO or self.layer is not None or self.cuts is not None):
            raise ConfigError(
                "the profile says methods and layers in stages: leave method, layer and cuts out"
            )
        if self.method not in (AUTO, profile.method):
            raise ConfigError(
                f"the profile is for method {profile.method!r}, not {self.method!r}: leave one of them out"
            )
        profile.check()
        said = profile.arguments(self.keep)
        if profile.stages:
            meaning = self.budget or profile.budget
            return dataclasses.replace(
                self, stages=said["stages"], keep=said["keep"], budget=meaning, profile=profile
            )
        if self.layer is not None or self.cuts is not None:
            solved = self.cuts is None or check_cuts(self.cuts)[-1].keep is None
            said |= {"cuts": self.cuts, "keep": (self.keep or profile.keep) if solved else self.keep}
        return dataclasses.replace(
            self,
            method=profile.method,
            keep=said["keep"],
            cuts=said["cuts"],
            budget=self.budget or profile.budget,
            profile=profile,
            parameters={**profile.parameters, **self.parameters},
        )

    @property
    def meaning(self) -> BudgetMeaning:
        """What `keep` means where nobody says."""
        return self.budget or "average"

    @classmethod
    def from_text(cls, texts: Mapping[str, str]) -> Arguments:
        """From words, as on a command line: each is read as its argument's type, others as the method's parameters.

        Raises:
            ConfigError: a text that cannot be read; says what it may be.
        """
        method = texts.get("method", AUTO)
        method = DEFAULT if method == AUTO else method
        read: dict[str, Any] = {}
        for name, text in texts.items():
            if name in NAMES:
                read[name] = _READERS.get(name, str)(text)
            else:
                defaults = _parameters(find_method(method))
                read[name] = read_like(name, text, defaults.get(name, ""))
        return cls.of(read)

    def given(self) -> dict[str, Any]:
        """As keyword arguments of `wrap`: those that differ from the defaults."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in NAMES}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {n: v for n, v in own.items() if v != defaults[n] or n == "method"} | dict(self.parameters)

    @classmethod
    def signature(cls, *before: inspect.Parameter) -> inspect.Signature:
        """Of a function that takes `before`, the method, and every other argument by name."""
        own = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if f.name == "method"
                else inspect.Parameter.KEYWORD_ONLY,
                default=f.default,
                annotation=f.type,
            )
            for f in dataclasses.fields(cls)
            if f.name in NAMES
        ]
        rest = inspect.Parameter("parameters", inspect.Parameter.VAR_KEYWORD, annotation=Any)
        return inspect.Signature([*before, *own, rest])


NAMES = tuple(f.name for f in dataclasses.fields(Arguments) if f.name != "parameters")


def _check_floor(asked: Arguments) -> None:
    """Raises ConfigError where it is no share, or cannot be kept to."""
    floor: Any = asked.text_floor
    if isinstance(floor, bool) or not isinstance(floor, float) or not 0 < floor <= 1:
        raise ConfigError(f"text_floor is a share in (0, 1], not {floor!r}")
    if asked.keep is not None and not isinstance(asked.keep, float):
        raise ConfigError("text_floor raises a share: give keep a share, too, not a number of tokens")
    if asked.allocation == "pooled":
        raise ConfigError("text_floor is settled image by image: leave allocation='pooled' out")


def _check_escalate(asked: Arguments) -> Escalate:
    """Raises ConfigError where it is none, or no larger budget."""
    given: Any = asked.escalate
    try:
        found = given if isinstance(given, Escalate) else Escalate(*given)
    except TypeError:
        raise ConfigError(f"escalate takes (keep, entropy), such as (0.33, 1.5), not {given!r:.60}") from None
    if asked.keep is not None and (not isinstance(asked.keep, float) or found.keep <= asked.keep):
        raise ConfigError(
            f"escalate goes from a smaller share to a larger one, not from {asked.keep} to {found.keep}"
        )
    if asked.allocation == "pooled" or asked.keep_lists is not None:
        raise ConfigError("escalate settles budgets row by row: leave allocation and keep_lists out")
    return found


def read_escalate(text: str) -> Escalate:
    """Escalation written as `33%@1.5`: what is kept then, and the entropy in nats above which.

    Raises:
        ConfigError: anything else.
    """
    keep, at, entropy = text.partition("@")
    try:
        if at:
            return Escalate(float(read_keep(keep)), float(entropy))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
    raise ConfigError(f"escalate takes a share and an entropy in nats, such as 33%@1.5, not {text!r}")


def _check_adaptive(asked: Arguments) -> None:
    """Refuse what an adaptive budget cannot be combined with.

    Raises:
        ConfigError: says why.
    """
    assert asked.adaptive_keep is not None
    if asked.adaptive_keep.tau is None:
        raise ConfigError(
            "this Adaptive has no tau yet: tokenprune.calibrate(model, calls, Adaptive(...)) finds it on a few pictures"
        )
    if asked.keep != asked.adaptive_keep.mean:
        raise ConfigError("keep is the Adaptive's mean: give the Adaptive as keep, and nothing beside it")
    if asked.allocation == "pooled":
        raise ConfigError("an adaptive budget is settled image by image: leave allocation='pooled' out")
    cuts = asked.cuts or asked.stages or ()
    if any(isinstance(getattr(cut, "keep", None), int) for cut in cuts):
        raise ConfigError("an adaptive budget is a share: give the cuts shares, too, not numbers of tokens")


def _with_profile(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, with the profile itself where its path is given."""
    profile = given.get("profile")
    if profile is None:
        return dict(given)
    from tokenprune.profiles.profile import Profile  # pydantic is not needed otherwise

    if isinstance(profile, str | Path):
        profile = Profile.load(profile)
    if not isinstance(profile, Profile):
        raise ConfigError(f"profile must be a tokenprune.Profile or the path of one, not {profile!r:.80}")
    return {**given, "profile": profile}


def _one_of(name: str, value: object, values: tuple[str, str]) -> None:
    if value not in values:
        raise ConfigError(f"{name} must be {values[0]!r} or {values[1]!r}, not {value!r}")


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def check_cuts(cuts: Any) -> tuple[Cut, ...]:
    """The cuts as `Cut`s, in order and each with a keep (but for the last, which may have none).

    Raises:
        ConfigError: says what they must look like.
    """
    try:
        checked = tuple(c if isinstance(c, Cut) else Cut(*c) for c in cuts)
    except TypeError:
        raise ConfigError(f"cuts must be a list of (layer, keep) pairs, not {cuts!r}") from None
    if not checked:
        raise ConfigError("cuts is empty; give at least one (layer, keep)")
    for cut in checked[:-1]:
        if cut.keep is None:
            raise ConfigError(
                f"the cut at layer {cut.layer} needs a keep; only the last cut is solved from the budget"
            )
    for cut in checked:
        if cut.keep is not None:
            check_keep(cut.keep, f"keep of the cut at layer {cut.layer}")
    for cut in checked:
        if isinstance(cut.layer, bool) or not isinstance(cut.layer, int):
            raise ConfigError(f"the layer of a cut must be an int, not {cut.layer!r}")
    if any(b.layer <= a.layer for a, b in pairwise(checked)):
        raise ConfigError("cuts must be in ascending order of layer, one per layer")
    for a, b in pairwise(checked):
        # A fraction and a count can be compared only once the image is known.
        if a.keep is not None and b.keep is not None and type(a.keep) is type(b.keep) and b.keep > a.keep:
            raise ConfigError(
                f"the cut at layer {b.layer} keeps {b.keep}, more than the {a.keep} left by the cut before it; "
                f"both are shares of the original tokens: make the schedule non-increasing"
            )
    return checked


def check_stages(stages: Any) -> tuple[Stage, ...]:
    """The stages as `Stage`s, their cuts as `check_cuts` has them.

    Raises:
        ConfigError: says what they must look like.
    """
    try:
        checked = tuple(own if isinstance(own, Stage) else Stage(*own) for own in stages)
    except TypeError:
        raise ConfigError(f"stages must be a list of (layer, method, keep), not {stages!r:.80}") from None
    for own in checked:
        if not isinstance(own.method, str | Method) or not isinstance(own.parameters, Mapping):
            raise ConfigError(f"a stage is (layer, method, keep, parameters), not {own!r:.80}")
        if own.method in (AUTO, "none"):
            raise ConfigError(f"a stage names the method that makes its cut, not {own.method!r}")
    cuts = check_cuts([Cut(own.layer, own.keep) for own in checked])
    return tuple(dataclasses.replace(own, keep=cut.keep) for own, cut in zip(checked, cuts, strict=True))


# -- reading texts ----------------------------------------------------------------------------------------------------

_COUNT = re.compile(r"[0-9]+")
_FRACTION = re.compile(r"[0-9]+\.[0-9]*|\.[0-9]+")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?%")
_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def read_keep(text: str) -> Keep:
    """How much to keep: `25%` and `0.25` are fractions, `192` is a count, `1.0` is all and `1` one token.

    Raises:
        ConfigError: anything else.
    """
    text = text.strip()
    keep: Keep | None = None
    if _COUNT.fullmatch(text):
        keep = int(text)
        wrong = "that keeps nothing"
    elif _FRACTION.fullmatch(text):
        keep = float(text)
        above = f"a fraction above 1; a number of tokens is written {int(keep)}"
        wrong = "that keeps nothing" if keep == 0 else above
    elif match := _PERCENT.fullmatch(text):
        keep = float(match[1]) / 100
        wrong = "that keeps nothing" if keep == 0 else "more than all tokens"
    else:
        wrong = "that is none of them"
    if keep is None or keep <= 0 or (isinstance(keep, float) and keep > 1):
        raise ConfigError(
            f"keep takes a fraction (25% or 0.25, at most 100%) or a number of tokens (192), not {text!r}: {wrong}"
        )
    return keep


def read_budget(text: str) -> Keep | Adaptive:
    """What `read_keep` reads, or an `Adaptive` around it: `25%~rank@4.5`, with bounds `25%~rank@4.5~8%~75%`.

    Raises:
        ConfigError: anything else.
    """
    mean, *rest = text.split("~")
    if not rest:
        return read_keep(text)
    rule, _, tau = rest[0].partition("@")
    try:
        bounds = [float(read_keep(own)) for own in rest[1:]]
        if len(bounds) in (0, 2):
            return Adaptive(float(read_keep(mean)), rule, float(tau), *bounds)  # type: ignore[arg-type]
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
    raise ConfigError(f"an adaptive keep is written 25%~rank@4.5 or 25%~rank@4.5~8%~75%, not {text!r}")


def read_layer(text: str) -> int | Literal["auto"]:
    """A decoder layer, or "auto".

    Raises:
        ConfigError: anything else.
    """
    if text == "auto":
        return "auto"
    if not _COUNT.fullmatch(text):
        raise ConfigError(f"layer takes a decoder layer (a whole number) or auto, not {text!r}")
    return int(text)


def read_cuts(text: str) -> tuple[Cut, ...]:
    """Cuts written as `2:50%,9:25%,18`; the last one's keep may be left to the budget.

    Raises:
        ConfigError: anything else.
    """
    cuts = []
    for part in text.split(","):
        layer, colon, keep = part.partition(":")
        if not _COUNT.fullmatch(layer.strip()):
            raise ConfigError(f"cuts takes layers with what each keeps, such as 2:50%,9:25%,18, not {text!r}")
        cuts.append(Cut(int(layer), read_keep(keep) if colon else None))
    return check_cuts(cuts)


_STAGE = re.compile(r"\s*(\d+):([\w-]+)(?:\(([^)]*)\))?(?::([^,:()]+))?\s*(?:[,;]|$)")


def read_stages(text: str) -> tuple[Stage, ...]:
    """Stages written as `0:vflowopt(even=0.3 recycling=none):20%,10:question:10%,20:question`.

    Semicolons do for commas where these part words, in lmms-eval's `model_args` for example.

    Raises:
        ConfigError: anything else.
    """
    stages, at = [], 0
    while at < len(text):
        found = _STAGE.match(text, at)
        if found is None:
            raise ConfigError(
                f"stages takes layer:method:keep, such as 0:vflowopt:20%,10:fastv:10%,20:fastv, not {text[at:]!r:.60}"
            )
        layer, method, words, keep = found.groups()
        pairs = [word.partition("=") for word in (words or "").split()]
        defaults = _parameters(find_method(method))
        own = {name: read_like(name, value, defaults.get(name, "")) for name, _, value in pairs}
        stages.append(Stage(int(layer), method, None if keep is None else read_keep(keep), own))
        at = found.end()
    return check_stages(stages)


def read_like(name: str, text: str, default: Any) -> Any:
    """A text as a value of the default's type.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(default, bool):
        if text.lower() not in _BOOLEANS:
            raise ConfigError(f"{name} takes true or false, not {text!r}")
        return _BOOLEANS[text.lower()]
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise ConfigError(f"{name} takes {kind}, not {text!r}") from None
    return text


def _no_text(text: str) -> Any:
    raise ConfigError("keep_lists cannot be given as text")


_READERS: dict[str, Callable[[str], Any]] = {
    "keep": read_budget,
    "layer": read_layer,
    "cuts": read_cuts,
    "stages": read_stages,
    "keep_lists": _no_text,
    "escalate": read_escalate,
    "text_floor": lambda text: float(read_keep(text)),
    "strict": lambda text: read_like("strict", text, False),
    "compact_early": lambda text: read_like("compact_early", text, False),
    "frame_floor": lambda text: read_like("frame_floor", text, 0),
}


def _parameters(method: type[Method] | None) -> dict[str, Any]:
    """By name a value of the type that a parameter is read as: its default, or a zero where that is None."""
    if method is None:
        return {}
    fields = dataclasses.fields(method)
    return {f.name: _zero(str(f.type)) if f.default is None else f.default for f in fields}


def _zero(annotation: str) -> Any:
    kinds = (float, int, bool)
    return next((kind() for kind in kinds if re.search(rf"\b{kind.__name__}\b", annotation)), "")
