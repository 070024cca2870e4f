"""The public calls: wrap, unwrap, pruned, override, report."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, overload

from tokenprune.arguments import Arguments
from tokenprune.errors import ConfigError, TokenPruneError, UnsupportedModelError
from tokenprune.methods import Method
from tokenprune.models import Family, find_family, stock_model
from tokenprune.releases import check_release
from tokenprune.reporting import Report, TotalReport, make_report, make_total
from tokenprune.runtime.install import Runtime
from tokenprune.runtime.notes import in_context
from tokenprune.settle import settle

ModelT = TypeVar("ModelT")

_ATTRIBUTE = "_tokenprune"
LOG = logging.getLogger("tokenprune")


def wrap(model: ModelT, method: str | Method = "auto", **arguments: Any) -> ModelT:
    """Prune visual tokens in every later call of `model`.

    Only hooks are added: the same object comes back, with the same class, config and state_dict keys, and
    `unwrap` takes everything off again.

    Args:
        model: a stock transformers model (or a PEFT model around one), already loaded.
        method: a name from `tokenprune methods`, or a `Method` of your own; see `tokenprune.Arguments` for the default.
        **arguments: see `tokenprune.Arguments`; other names are parameters of the method.

    Returns:
        `model` itself.

    Raises:
        ConfigError: a wrong argument.
        UnsupportedModelError: the model, or the installed transformers, is not supported.
        TokenPruneError: the model is wrapped already.

    Example:
        >>> model = tokenprune.wrap(model, "entropyprune", keep=0.25)  # doctest: +SKIP
    """
    check_release()
    inner = stock_model(model)
    runtime = None
    try:  # around the lock: an interrupt may come while it is given back, too
        with _WRAPPING:
            if _ATTRIBUTE in inner.__dict__:
                raise TokenPruneError(
                    "this model is wrapped already; tokenprune.unwrap(model) first, or change one call with "
                    "tokenprune.override"
                )
            asked = Arguments.of({"method": method, **arguments})
            family = find_family(inner, asked.family)
            runtime = Runtime(family, settle(family, asked))
            runtime.install()
            inner.__dict__[_ATTRIBUTE] = runtime
            LOG.info("wrapped a %s model: %s", family.name, runtime.config.described())
            return model
    except BaseException:
        if runtime is not None:
            inner.__dict__.pop(_ATTRIBUTE, None)
            runtime.abandon()
        raise


# Reentrant: a finalizer or a signal's handler that comes in between may wrap a model, too.
_WRAPPING = threading.RLock()


def unwrap(model: ModelT) -> ModelT:
    """Take pruning off again: the model is exactly as it was before `wrap`.

    Raises:
        TokenPruneError: the model is not wrapped, or in use: a call is under way, or an override is in force in
            another thread or task.
    """
    with _WRAPPING:
        runtime = _runtime(model)
        runtime.remove()
        del runtime.model.__dict__[_ATTRIBUTE]
        LOG.info("unwrapped")
    return model


@contextmanager
def pruned(model: ModelT, method: str | Method = "auto", **arguments: Any) -> Iterator[ModelT]:
    """`wrap` on entry, `unwrap` on exit. Arguments and errors as for `wrap`."""
    wrap(model, method, **arguments)
    try:
        yield model
    finally:
        unwrap(model)


@contextmanager
def override(model: ModelT, **changes: Any) -> Iterator[ModelT]:
    """Change arguments of `wrap` for this thread's or task's calls inside the block: `with override(model, keep=0.1):`.

    See `Arguments.changed` for what replaces what. A thread that is started inside runs without it, and warns; give it
    `in_context(function)` to run.

    Raises:
        ConfigError: a wrong argument; the model is left as it was.
    """
    runtime = _runtime(model)
    asked = runtime.settings.asked.changed(changes)
    config = settle(runtime.family, asked, known=changes.get("profile") is None)
    with runtime.overriding(config):
        yield model


@overload
def report(model: object, *, total: Literal[False] = False, reset: bool = False) -> Report: ...
@overload
def report(model: object, *, total: Literal[True], reset: bool = False) -> TotalReport: ...
def report(model: object, *, total: bool = False, reset: bool = False) -> Report | TotalReport:
    """What happened to the last prompt this thread or task had the wrapped model process.

    Args:
        model: wrapped.
        total: sums over all prompts since `wrap`, or since the last reset, of all threads.
        reset: with `total`: start the sums anew.

    Raises:
        TokenPruneError: the model is not wrapped, or has not been called yet.
        ConfigError: `reset` without `total`.
    """
    runtime = _runtime(model)
    if total:
        summed = make_total(runtime.total)
        if reset:
            runtime.total.reset()
        return summed
    if reset:
        raise ConfigError("reset=True starts the sums anew: pass total=True with it")
    outcome = runtime.outcome
    if outcome is None:
        raise TokenPruneError("the wrapped model has not been called yet, so there is nothing to report")
    return make_report(outcome)


def is_wrapped(model: object) -> bool:
    """Whether `model` is wrapped at the moment."""
    try:
        return _ATTRIBUTE in stock_model(model).__dict__
    except UnsupportedModelError:
        return False


def runtime_of(model: object) -> Runtime | None:
    """The hooks of a wrapped model, for analysis; None where it is not wrapped."""
    runtime = stock_model(model).__dict__.get(_ATTRIBUTE)
    assert runtime is None or isinstance(runtime, Runtime)
    return runtime


def family_of(model: object) -> Family:
    """The family a model was wrapped with, or the one its config says."""
    runtime = runtime_of(model)
    return find_family(stock_model(model)) if runtime is None else runtime.family


def _runtime(model: object) -> Runtime:
    runtime = runtime_of(model)
    if runtime is None:
        raise TokenPruneError("this model is not wrapped; call tokenprune.wrap(model, ...) first")
    if runtime.model is not stock_model(model):
        raise TokenPruneError(
            "this is a shallow copy of a wrapped model; unwrap the model it was copied from first"
        )
    return runtime


_MODEL = inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD)
for _function in (wrap, pruned):
    setattr(_function, "__signature__", Arguments.signature(_MODEL))  # noqa: B010  # for help()

__all__ = ["ConfigError", "in_context", "is_wrapped", "override", "pruned", "report", "unwrap", "wrap"]
