"""The Entropy Collapse Layer: where the visual tokens' diversity drops, with how far that can be trusted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tokenprune.analysis.layers import read_layers
from tokenprune.cache import cache_folder
from tokenprune.errors import ConfigError, NoCollapseError
from tokenprune.estimators import Estimator
from tokenprune.fingerprint import fingerprint
from tokenprune.models import find_family, stock_model

MIN_IMAGES = 16
_LEVEL = (2.5, 97.5)
_LARGEST_FILE = 2**20

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Collapse(BaseModel):
    """What was found; L decoder layers. A JSON document that is checked when it is read.

    Attributes:
        version: of this document.
        layer: the Entropy Collapse Layer, the l in 1 .. L/2 with the largest mean drop H_{l-1} - H_l.
        clear: whether that drop's interval lies above 0 and above the second largest drop's interval.
        source: "detected", or "fallback" when there was no clear collapse and a layer was given for that case.
        estimator: what H is.
        mean, low, high: (L + 1,) diversity on entering layer l, and its 95 % bootstrap interval over images.
        drop, drop_low, drop_high: (L + 1,) H_{l-1} - H_l and its interval, from the same resamples; 0 at l = 0.
        images, excluded: how many images were used, and left out because some layer's value was not a number.
        resamples, seed: of the bootstrap.
        model: the model's fingerprint, "" when it was not asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    version: Literal[1] = 1
    layer: Annotated[int, Field(ge=1, le=10_000)]
    clear: bool
    source: Literal["detected", "fallback"] = "detected"
    estimator: Annotated[str, Field(max_length=200)]
    mean: tuple[Finite, ...]
    low: tuple[Finite, ...]
    high: tuple[Finite, ...]
    drop: tuple[Finite, ...]
    drop_low: tuple[Finite, ...]
    drop_high: tuple[Finite, ...]
    images: Annotated[int, Field(ge=1)]
    excluded: Annotated[int, Field(ge=0)]
    resamples: int
    seed: int
    model: Annotated[str, Field(max_length=64)] = ""

    @model_validator(mode="after")
    def _lengths(self) -> Collapse:
        curves = (self.mean, self.low, self.high, self.drop, self.drop_low, self.drop_high)
        if len({len(c) for c in curves}) != 1 or not self.layer < len(self.mean):
            raise ValueError("the curves must be of one length, and the layer on them")
        return self

    @property
    def runner_up(self) -> int | None:
        """The layer of the second largest drop in the searched half, or None when there is but one."""
        others = [l for l in _candidates(len(self.mean) - 1) if l != self.steepest]
        return max(others, key=lambda l: self.drop[l]) if others else None

    @property
    def steepest(self) -> int:
        """The layer of the largest drop in the searched half, whether it is clear or not."""
        return max(_candidates(len(self.mean) - 1), key=lambda l: self.drop[l])

    def verdict(self) -> str:
        """One sentence for people."""
        l = self.steepest
        drop = f"H drops by {self.drop[l]:.4f} [{self.drop_low[l]:.4f}, {self.drop_high[l]:.4f}] on entering layer {l}"
        of = f"({self.estimator}, {self.images} images)"
        if self.clear:
            return f"clear collapse: {drop} {of}"
        if self.drop_low[l] <= 0:
            return f"no clear collapse: {drop}, which could be none at all {of}"
        other = self.runner_up
        assert other is not None
        return (
            f"no clear collapse: {drop}, but by {self.drop[other]:.4f} [{self.drop_low[other]:.4f}, "
            f"{self.drop_high[other]:.4f}] at layer {other} too {of}"
        )


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
    inner = stock_model(model)
    layers = len(find_family(inner).layers(inner))
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
    folder = cached_path(own).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ConfigError(
            f"the layer cannot be kept in {str(folder)!r}; set TOKENPRUNE_CACHE to a folder that can be written to, or "
            f"pass save=False"
        )
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
        path = cached_path(found.model)
        try:
            # Written beside and renamed, so that a reader never sees half of it.
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False
            ) as file:
                file.write(found.model_dump_json(indent=1))
            os.replace(file.name, path)
        except OSError as error:
            raise ConfigError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
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
    candidates = _candidates(points - 1)
    ranked = sorted(candidates, key=lambda l: -drop[l])
    first = ranked[0]
    above_second = len(ranked) < 2 or drop_low[first] > drop_high[ranked[1]]
    return Collapse(
        layer=first,
        clear=bool(drop_low[first] > 0 and above_second),
        estimator=estimator,
        mean=mean.tolist(),
        low=low.tolist(),
        high=high.tolist(),
        drop=drop.tolist(),
        drop_low=drop_low.tolist(),
        drop_high=drop_high.tolist(),
        images=n,
        excluded=excluded,
        resamples=resamples,
        seed=seed,
    )


def _candidates(num_layers: int) -> Sequence[int]:
    return range(1, num_layers // 2 + 1)


# -- the cache ------------------------------------------------------------------------------------------------------


def cached_path(model: str) -> Path:
    """The file of the model with that fingerprint."""
    return cache_folder() / "ecl" / f"{model}.json"


def read_collapse(path: Path) -> Collapse:
    """A result from its file.

    Raises:
        ConfigError: no such file, or not what `detect_ecl` writes.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path} is too large for a detected layer; remove it and detect again")
        return Collapse.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        what = error.errors()[0]
        where = ".".join(map(str, what["loc"])) or "the document"
        raise ConfigError(
            f"{path} is no detected layer ({where}: {what['msg']}); remove it and detect again"
        ) from None


def detected_layer(model: Any) -> Collapse:
    """What `detect_ecl` found for this model before.

    Raises:
        ConfigError: nothing yet, or the file is not one of ours or of another model.
    """
    own = fingerprint(model)
    path = cached_path(own)
    if not path.is_file():
        raise ConfigError(
            "layer='auto' takes the layer that was detected for this model, and none was yet: run "
            "tokenprune.detect_ecl(model, calls) or 'tokenprune ecl MODEL --data ...' once, or give a number"
        )
    found = read_collapse(path)
    if found.model != own:
        raise ConfigError(f"{path} is of another model; remove it and detect again")
    return found
