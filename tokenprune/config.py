"""The checked form of `wrap`'s arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from tokenprune.budget import BudgetMeaning, Cut, Keep, average_floor, check_keep
from tokenprune.errors import BudgetError, ConfigError
from tokenprune.methods import DecoderShape, Method, NoPruning, ScoreMethod, make_method
from tokenprune.models.base import Family
from tokenprune.models.decoder import check_states

Positions = Literal["keep", "compact"]
Allocation = Literal["image", "pooled"]
# keep_lists[cut][row][image] = kept raster indices
KeepLists = Sequence[Sequence[Sequence[Any]]]


@dataclass(frozen=True)
class PruneConfig:
    """What a wrapped model does at each call.

    Attributes:
        method: the pruning method.
        cuts: where to prune, ascending; empty for `none`.
        keep: the overall budget, or None when every cut says its own.
        budget: meaning of `keep`.
        positions: "keep" (original position ids) or "compact".
        strict: raise instead of warning when nothing was pruned.
        keep_lists: forced keep lists, or None.
        layer_reason: where the cut's layer came from, for the report.
        allocation: whether each image has a budget of its own, or a prompt's images share one.
        frame_floor: tokens that every frame of a video, and every view of an image, keeps at least.
    """

    method: Method
    cuts: tuple[Cut, ...]
    keep: Keep | None
    budget: BudgetMeaning
    positions: Positions
    strict: bool
    keep_lists: KeepLists | None
    layer_reason: str
    allocation: Allocation = "image"
    frame_floor: int = 0


def make_config(
    model: nn.Module,
    family: Family,
    *,
    method: str | Method = "entropyprune",
    keep: Keep | None = None,
    layer: int | Literal["auto"] | None = None,
    cuts: Sequence[Cut | tuple[int, Keep | None]] | None = None,
    budget: BudgetMeaning = "average",
    positions: Positions = "keep",
    strict: bool = False,
    keep_lists: KeepLists | None = None,
    allocation: Allocation = "image",
    frame_floor: int = 0,
    **parameters: Any,
) -> PruneConfig:
    """Check every argument of `wrap` against the model, before anything is touched.

    Raises:
        ConfigError: names the argument and what it may be.
    """
    num_layers = len(family.layers(model))
    made = make_method(method, parameters)
    made.check(decoder_shape(model, family))
    if any(state != "hidden" for state in made.needs().states):
        check_states(family.text_model(model).config)
    if budget not in ("average", "after_cut"):
        raise ConfigError(f"budget must be 'average' or 'after_cut', not {budget!r}")
    if positions not in ("keep", "compact"):
        raise ConfigError(f"positions must be 'keep' or 'compact', not {positions!r}")
    if allocation not in ("image", "pooled"):
        raise ConfigError(f"allocation must be 'image' or 'pooled', not {allocation!r}")
    if isinstance(frame_floor, bool) or not isinstance(frame_floor, int) or frame_floor < 0:
        raise ConfigError(f"frame_floor must be a number of tokens, 0 or more, not {frame_floor!r}")
    if frame_floor and not isinstance(made, ScoreMethod):
        raise ConfigError(
            f"frame_floor needs a method that scores tokens; {made.name!r} does not: leave it out"
        )
    if not isinstance(strict, bool):
        raise ConfigError(f"strict must be True or False, not {strict!r}")
    if isinstance(made, NoPruning):
        if keep is not None or cuts is not None or keep_lists is not None:
            raise ConfigError("method 'none' keeps everything: leave keep, cuts and keep_lists out")
        return PruneConfig(made, (), None, budget, "keep", strict, None, "nothing is cut")
    if keep is not None:
        keep = check_keep(keep)
    if cuts is not None:
        if layer is not None:
            raise ConfigError("pass layer or cuts, not both")
        checked, reason = check_cuts(cuts), "given"
    else:
        if layer == "auto":
            layer, reason = _detected_layer(model)
        elif layer is None:
            layer, reason = _default_layer(family, num_layers, made)
        else:
            reason = "given"
        checked = (Cut(layer),)
    for cut in checked:
        _check_layer(cut.layer, num_layers, made)
    if keep_lists is not None:
        if not hasattr(keep_lists, "__len__"):
            raise ConfigError(
                f"keep_lists must be keep_lists[cut][row][image] = kept raster indices, not {keep_lists!r}"
            )
        if len(keep_lists) != len(checked):
            raise ConfigError(
                f"keep_lists has {len(keep_lists)} cuts, but the model is cut {len(checked)} times"
            )
    elif checked[-1].keep is None:
        if keep is None:
            raise ConfigError("say how much to keep, for example keep=0.25 (a fraction) or keep=144 (tokens)")
        _check_average(keep, checked, num_layers, budget)
    elif keep is not None:
        raise ConfigError("every cut says its own keep; leave the overall keep out, or the last cut's")
    if positions == "compact" and (family.mrope or any(cut.layer for cut in checked)):
        raise ConfigError(
            f"positions='compact' is offered for cuts before the LLM (layer=0) of models with one position per token; "
            f"here the cuts are at {', '.join(str(c.layer) for c in checked)} of a {family.name} model: use 'keep'"
        )
    return PruneConfig(
        made, checked, keep, budget, positions, strict, keep_lists, reason, allocation, frame_floor
    )


def decoder_shape(model: nn.Module, family: Family) -> DecoderShape:
    text: Any = family.text_model(model).config
    heads = text.num_attention_heads
    attention: Any = family.attention(family.layers(model)[0])
    return DecoderShape(
        num_layers=len(family.layers(model)),
        num_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=int(attention.head_dim),
        hidden_size=text.hidden_size,
    )


def check_cuts(cuts: Sequence[Cut | tuple[int, Keep | None]]) -> tuple[Cut, ...]:
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


def _check_layer(layer: object, num_layers: int, method: Method) -> None:
    # Queries, keys and values are those of the layer before the cut.
    lowest = max(method.min_layer, int(any(state != "hidden" for state in method.needs().states)))
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ConfigError(f"layer must be an int from {lowest} to {num_layers - 1}, or 'auto', not {layer!r}")
    if not lowest <= layer < num_layers:
        why = ": it scores states of the layer before the cut" if layer == 0 else ""
        raise ConfigError(
            f"method {method.name!r} can cut this model at layers {lowest} to "
            f"{num_layers - 1}, not {layer}{why}"
        )


def _default_layer(family: Family, num_layers: int, method: Method) -> tuple[int, str]:
    published = family.published_layer
    if published is not None and published < num_layers:
        return published, f"published for {family.name}"
    return max(1, round(num_layers / 16)), "L / 16"


def _detected_layer(model: nn.Module) -> tuple[int, str]:
    from tokenprune.analysis.collapse import detected_layer  # pydantic is not needed otherwise

    found = detected_layer(model)
    return found.layer, f"{found.source} on {found.images} images by {found.estimator}"


def _check_average(keep: Keep, cuts: tuple[Cut, ...], num_layers: int, budget: BudgetMeaning) -> None:
    """A fraction no image size can reach is refused now; the rest is known once the image is."""
    if budget != "average" or isinstance(keep, int) or len(cuts) > 1:
        return
    layer = cuts[0].layer
    if layer and keep <= layer / num_layers:
        low = average_floor(layer, num_layers, 10**9)
        raise BudgetError(
            f"an average of {keep:.1%} cannot be reached by a cut at layer {layer} of {num_layers}: "
            "the reachable range "
            f"starts above {low:.1%}; cut earlier, keep more, or use budget='after_cut'"
        )
