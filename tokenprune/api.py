"""The public calls: wrap, unwrap, pruned, override, report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import transformers

from tokenprune.budget import BudgetMeaning, Cut, Keep
from tokenprune.config import Allocation, KeepLists, Positions, PruneConfig, check_cuts, make_config
from tokenprune.errors import ConfigError, TokenPruneError, UnsupportedModelError
from tokenprune.methods import Method
from tokenprune.models import find_family, stock_model
from tokenprune.reporting import Report, make_report
from tokenprune.runtime.hooks import Runtime

ModelT = TypeVar("ModelT")

_ATTRIBUTE = "_tokenprune"
_OLDEST = (5, 17)


class _Wrapped:
    """What `wrap` leaves on the model: the runtime, and the arguments it was made from."""

    def __init__(self, runtime: Runtime, arguments: dict[str, Any]) -> None:
        self.runtime, self.arguments = runtime, arguments


def wrap(
    model: ModelT,
    method: str | Method = "entropyprune",
    *,
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
) -> ModelT:
    """Prune visual tokens in every later call of `model`.

    Only hooks are added: the same object comes back, with the same class, config and state_dict keys, and
    `unwrap` takes everything off again.

    Args:
        model: a stock transformers model (or a PEFT model around one), already loaded.
        method: a name from `tokenprune methods`, or a `Method` of your own.
        keep: how many visual tokens to keep: a float in (0, 1] is a fraction, an int a number per image.
        layer: prune on entering this decoder layer; 0 is before the LLM. Default: the family's published layer.
            "auto": the one `detect_ecl` found for this model.
        cuts: several cuts instead of `layer`: (layer, keep) pairs, each keep a share of the image's original
            tokens; leave the last one's keep None to have it solved from the budget.
        budget: what `keep` means: "average" over the decoder layers (as papers count), or "after_cut".
        positions: "keep" the original position ids, or "compact" them (cuts before the LLM with 1-D RoPE only).
        strict: raise instead of warning when a call prunes nothing although the budget asked for it.
        keep_lists: force what is kept: keep_lists[cut][row][image] = ascending raster indices.
        allocation: "image": every image has a budget of its own; "pooled": a prompt's images share the sum of theirs.
        frame_floor: tokens that every frame of a video, and every view of an image, keeps at least.
        **parameters: of the method.

    Returns:
        `model` itself.

    Raises:
        ConfigError: a wrong argument.
        UnsupportedModelError: the model, or the installed transformers, is not supported.
        TokenPruneError: the model is wrapped already.

    Example:
        >>> model = tokenprune.wrap(model, "entropyprune", keep=0.25)  # doctest: +SKIP
    """
    version = tuple(
        int("".join(c for c in part if c.isdigit()) or 0) for part in transformers.__version__.split(".")[:2]
    )
    if version < _OLDEST:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} is too old: install transformers >= {'.'.join(map(str, _OLDEST))}"
        )
    inner = stock_model(model)
    if _ATTRIBUTE in inner.__dict__:
        raise TokenPruneError(
            "this model is wrapped already; tokenprune.unwrap(model) first, or change one call with tokenprune.override"
        )
    arguments = {
        "method": method,
        "keep": keep,
        "layer": layer,
        "cuts": cuts,
        "budget": budget,
        "positions": positions,
        "strict": strict,
        "keep_lists": keep_lists,
        "allocation": allocation,
        "frame_floor": frame_floor,
        **parameters,
    }
    family = find_family(inner)
    runtime = Runtime(inner, family, make_config(inner, family, **arguments))
    runtime.install()
    inner.__dict__[_ATTRIBUTE] = _Wrapped(runtime, arguments)
    return model


def unwrap(model: ModelT) -> ModelT:
    """Take pruning off again: the model is exactly as it was before `wrap`.

    Raises:
        TokenPruneError: the model is not wrapped.
    """
    wrapped = _wrapped(model)
    wrapped.runtime.remove()
    del wrapped.runtime.model.__dict__[_ATTRIBUTE]
    return model


@contextmanager
def pruned(model: ModelT, method: str | Method = "entropyprune", **arguments: Any) -> Iterator[ModelT]:
    """`wrap` on entry, `unwrap` on exit. Arguments and errors as for `wrap`."""
    wrap(model, method, **arguments)
    try:
        yield model
    finally:
        unwrap(model)


@contextmanager
def override(model: ModelT, **changes: Any) -> Iterator[ModelT]:
    """Change arguments of `wrap` for the calls inside the block: `with override(model, keep=0.1): ...`.

    A new `method` starts from its own default parameters; a new `layer` replaces `cuts` and the other way round.
    Method "none", and cuts that all say their own keep, need no `keep=None` beside them.

    Raises:
        ConfigError: a wrong argument; the model is left as it was.
    """
    wrapped = _wrapped(model)
    runtime = wrapped.runtime
    arguments = dict(wrapped.arguments)
    if "method" in changes:
        arguments = {k: v for k, v in arguments.items() if k in _COMMON}
    if "layer" in changes:
        arguments["cuts"] = None
    if "cuts" in changes:
        arguments["layer"] = None
        if changes["cuts"] is not None and check_cuts(changes["cuts"])[-1].keep is not None:
            arguments["keep"] = None
    if changes.get("method") == "none":
        arguments.update(keep=None, layer=None, cuts=None, keep_lists=None)
    if {"layer", "cuts", "keep"} & changes.keys():
        arguments["keep_lists"] = None
    before, saved = runtime.config, wrapped.arguments
    wrapped.arguments = {**arguments, **changes}
    try:
        config = make_config(runtime.model, runtime.family, **wrapped.arguments)
        _switch(runtime, config)
        yield model
    finally:
        wrapped.arguments = saved
        if runtime.config is not before:
            _switch(runtime, before)


_COMMON = (
    *("method", "keep", "layer", "cuts", "budget", "positions", "strict", "keep_lists"),
    *("allocation", "frame_floor"),
)


def _switch(runtime: Runtime, config: PruneConfig) -> None:
    before = runtime.config
    runtime.remove()
    runtime.config = config
    try:
        runtime.install()
    except BaseException:
        runtime.config = before
        runtime.install()
        raise


def report(model: object) -> Report:
    """What happened to the last prompt the wrapped model processed.

    Raises:
        TokenPruneError: the model is not wrapped, or has not been called yet.
    """
    outcome = _wrapped(model).runtime.outcome
    if outcome is None:
        raise TokenPruneError("the wrapped model has not been called yet, so there is nothing to report")
    return make_report(outcome)


def is_wrapped(model: object) -> bool:
    """Whether `model` is wrapped at the moment."""
    try:
        return _ATTRIBUTE in stock_model(model).__dict__
    except UnsupportedModelError:
        return False


def _wrapped(model: object) -> _Wrapped:
    wrapped = stock_model(model).__dict__.get(_ATTRIBUTE)
    if wrapped is None:
        raise TokenPruneError("this model is not wrapped; call tokenprune.wrap(model, ...) first")
    assert isinstance(wrapped, _Wrapped)
    return wrapped


__all__ = ["ConfigError", "is_wrapped", "override", "pruned", "report", "unwrap", "wrap"]
