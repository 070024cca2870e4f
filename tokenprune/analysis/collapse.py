"""The Entropy Collapse Layer: where the visual tokens' diversity drops, with how far that can be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenprune.analysis.layers import read_layers
from tokenprune.api import is_wrapped
from tokenprune.errors import ConfigError, TokenPruneError
from tokenprune.estimators import Estimator
from tokenprune.fingerprint import fingerprint
from tokenprune.models import find_family, stock_model
from tokenprune.profiles.collapse import KIND, Collapse, candidates, collapse_path
from tokenprune.profiles.store import check_writable, write_document

MIN_IMAGES = 16
_LEVEL = (2.5, 97.5)


class NoCollapseError(TokenPruneError):
    """The visual tokens' diversity has no clear collapse; `collapse` holds the curve."""

    def __init__(self, message: str, collapse: Collapse) -> None:
        super().__init__(message)
        self.collapse = collapse


def detect_ecl(
    model: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    estimator: str | Estimator = "von_neumann",
    fallback_layer: int | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    save: bool = True,
) -> Collapse:
    """Find a model's Entropy Collapse Layer on calibration samples, one prefill each.

    Paper: EntropyPrune, arXiv 2602.17196; the interval, the verdict and the refusal are ours.

    Args:
        model: a stock model that is not wrapped.
        calls: inputs as its processor makes them, with at least 16 images in all.
        estimator: what is followed through the layers.
        fallback_layer: the layer to use when there is no clear collapse.
        resamples: bootstrap resamples of the images, the same for all layers.
        seed: of the bootstrap.
        save: keep the result under the model's fingerprint, for `wrap(model, layer="auto")`, in place of an older one.

    Raises:
        NoCollapseError: there is no clear collapse and no `fallback_layer`; the curve is its `.collapse`.
        ConfigError: fewer than 16 images, or a wrong argument.
        TokenPruneError: the model is wrapped.
    """
    own = begin(model, fallback_layer, save=save)
    statistics = read_layers(model, calls, [estimator], attention=False)
    (values,) = statistics.visual.items()
    found = find_collapse(values[1], values[0], resamples=resamples, seed=seed)
    return settle(found, own, fallback_layer, save=save)


def begin(model: Any, fallback_layer: object, *, save: bool) -> str:
    """Refuse what can be refused before anything is measured; returns the model's fingerprint ("" without `save`).

    Raises:
        ConfigError: the model has no such layer, or the cache cannot be written to.
        UnsupportedModelError: the model's weights are not in memory and cannot be recognised again.
    """
    if is_wrapped(model):
        raise TokenPruneError(
            "the model is wrapped; tokenprune.unwrap(model) before its collapse is looked for"
        )
    inner = stock_model(model)
    layers = len(find_family(inner).layers())
    good = (
        isinstance(fallback_layer, int)
        and not isinstance(fallback_layer, bool)
        and 0 < fallback_layer < layers
    )
    if fallback_layer is not None and not good:
        raise ConfigError(f"fallback_layer must be an int from 1 to {layers - 1}, not {fallback_layer!r}")
    if not save:
        return ""
    own = fingerprint(model)
    check_writable(KIND)
    return own


def settle(found: Collapse, model: str, fallback_layer: int | None, *, save: bool) -> Collapse:
    """Refuse an unclear collapse or put the fallback in its place, and keep the result; the last one kept counts.

    Raises:
        NoCollapseError: not clear, and no fallback.
        ConfigError: the file could not be written.
    """
    update: dict[str, Any] = {"model": model}
    if not found.clear and fallback_layer is not None:
        update |= {"layer": fallback_layer, "source": "fallback"}
    found = found.model_copy(update=update)
    if not found.clear and fallback_layer is None:
        raise NoCollapseError(f"{found.verdict()}; choose a layer yourself, or give fallback_layer", found)
    if save:
        write_document(found, collapse_path(found.model))
    return found


def find_collapse(
    curves: NDArray[np.float64], estimator: str = "", *, resamples: int = 10_000, seed: int = 0
) -> Collapse:
    """Where curves (images, L + 1) collapse. `Collapse.clear` says whether that can be trusted.

    Raises:
        ConfigError: fewer than 16 images without NaN, fewer than two layers, or a wrong `resamples` or `seed`.
    """
    if curves.ndim != 2 or curves.shape[1] < 3:
        raise ConfigError("a collapse layer needs a model of at least two decoder layers")
    for name, value, least in (("resamples", resamples, 100), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an int of at least {least}, not {value!r}")
    whole = np.isfinite(curves).all(1)
    excluded, curves = int((~whole).sum()), curves[whole]
    n, points = curves.shape
    if n < MIN_IMAGES:
        left_out = f" ({excluded} more were left out: their values are not numbers)" if excluded else ""
        raise ConfigError(f"at least {MIN_IMAGES} images are needed to tell a collapse, not {n}{left_out}")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    means = counts @ curves / n  # (resamples, L + 1): one resample of images for all layers
    mean = curves.mean(0)
    drop = -np.diff(mean, prepend=mean[0])
    low, high = np.percentile(means, _LEVEL, axis=0)
    drop_low, drop_high = np.percentile(-np.diff(means, axis=1, prepend=means[:, :1]), _LEVEL, axis=0)
    ranked = sorted(candidates(points - 1), key=lambda l: -drop[l])
    first = ranked[0]
    above_second = len(ranked) < 2 or drop_low[first] > drop_high[ranked[1]]
    return Collapse(
        layer=first,
        clear=bool(drop_low[first] > 0 and above_second),
        estimator=estimator,
        mean=tuple(mean.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        drop=tuple(drop.tolist()),
        drop_low=tuple(drop_low.tolist()),
        drop_high=tuple(drop_high.tolist()),
        images=n,
        excluded=excluded,
        resamples=resamples,
        seed=seed,
    )
