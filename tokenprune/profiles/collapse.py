"""The Entropy Collapse Layer that was detected for a model, as it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tokenprune.errors import ConfigError
from tokenprune.profiles.store import Document, Fingerprint, Number, read_document, stored_path

KIND = "ecl"


class Collapse(Document):
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

    version: Literal[1] = 1
    layer: Annotated[int, Field(ge=1, le=10_000)]
    clear: bool
    source: Literal["detected", "fallback"] = "detected"
    estimator: Annotated[str, Field(max_length=200, pattern=r"^[ -~]*$")]  # nothing that steers a terminal
    mean: tuple[Number, ...]
    low: tuple[Number, ...]
    high: tuple[Number, ...]
    drop: tuple[Number, ...]
    drop_low: tuple[Number, ...]
    drop_high: tuple[Number, ...]
    images: Annotated[int, Field(ge=1)]
    excluded: Annotated[int, Field(ge=0)]
    resamples: int
    seed: int
    model: Fingerprint = ""

    @model_validator(mode="after")
    def _lengths(self) -> Collapse:
        curves = (self.mean, self.low, self.high, self.drop, self.drop_low, self.drop_high)
        if len({len(c) for c in curves}) != 1 or not self.layer < len(self.mean):
            raise ValueError("the curves must be of one length, and the layer on them")
        return self

    @property
    def runner_up(self) -> int | None:
        """The layer of the second largest drop in the searched half, or None when there is but one."""
        others = [l for l in candidates(len(self.mean) - 1) if l != self.steepest]
        return max(others, key=lambda l: self.drop[l]) if others else None

    @property
    def steepest(self) -> int:
        """The layer of the largest drop in the searched half, whether it is clear or not."""
        return max(candidates(len(self.mean) - 1), key=lambda l: self.drop[l])

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


def candidates(num_layers: int) -> Sequence[int]:
    """Layers that can be the collapse layer: those of the first half."""
    return range(1, num_layers // 2 + 1)


def collapse_path(model: str) -> Path:
    """The file of the model with that fingerprint."""
    return stored_path(KIND, model)


def read_collapse(path: Path) -> Collapse:
    """A result from its file.

    Raises:
        ConfigError: no such file, or not what `detect_ecl` writes.
    """
    return read_document(Collapse, path, "detected layer")


def detected_layer(own: str) -> Collapse:
    """What `detect_ecl` found for the model of this fingerprint before.

    Raises:
        ConfigError: nothing yet, or the file is not one of ours or of another model.
    """
    path = collapse_path(own)
    try:
        known = path.is_file()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    if not known:
        raise ConfigError(
            "layer='auto' takes the layer that was detected for this model, and none was yet: run "
            "tokenprune.detect_ecl(model, calls) or 'tokenprune ecl MODEL --data ...' once, or give a number"
        )
    found = read_collapse(path)
    if found.model != own:
        raise ConfigError(f"{path} is of another model; remove it and detect again")
    return found
