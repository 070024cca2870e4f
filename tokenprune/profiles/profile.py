"""A pruning profile: what was found to work on a model, as a versioned JSON document, checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tokenprune.adaptive import Adaptive
from tokenprune.budget import scaled_shares
from tokenprune.errors import ConfigError
from tokenprune.files import given_path
from tokenprune.methods import NoPruning, Staged, make_method
from tokenprune.profiles import hub
from tokenprune.profiles.store import Document, Fingerprint, Line, Number, read_document, write_document

STAGES = Staged.name
PRESETS = Path(__file__).with_name("published")
Name = Annotated[str, Field(max_length=64, pattern=r"^[a-z][a-z0-9_]*$")]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Value = bool | int | Number | Line | None


class ProfileCut(Document):
    """A cut: its layer, and what it keeps of an image's original tokens (None: solved from the budget)."""

    layer: Annotated[int, Field(ge=0, le=10_000)]
    keep: Share | Count | None = None


class ProfileStage(ProfileCut):
    """A cut with the method that makes it."""

    method: Name
    parameters: dict[Name, Value] = Field(default_factory=dict, max_length=64)


class ProfileAdaptive(Document):
    """How the budget follows each picture; see `Adaptive`."""

    rule: Literal["energy", "rank", "grey"]
    tau: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    low: Annotated[float, Field(ge=0, le=1)] = 0.0
    high: Annotated[float, Field(ge=0, le=1)] = 1.0


class Made(Document):
    """How a profile was made: digest of the data, samples, sampler and seed, trials, versions, hardware, date."""

    how: Line = ""
    data: Line = ""
    samples: Annotated[int, Field(ge=0)] = 0
    sampler: Line = ""
    seed: int = 0
    trials: Annotated[int, Field(ge=0)] = 0
    versions: dict[Name, Line] = Field(default_factory=dict, max_length=32)
    hardware: Line = ""
    date: Line = ""


class Measured(Document):
    """What was measured: drift (mean, and quantiles by percent), of controls at the same budget, FLOPs and seconds."""

    metric: Line = "cosine"
    drift: Number
    quantiles: dict[Annotated[str, Field(pattern=r"^[0-9]{1,3}$")], Number] = Field(
        default_factory=dict, max_length=16
    )
    controls: dict[Name, Number] = Field(default_factory=dict, max_length=16)
    flops: Number | None = None
    seconds: Number | None = None


class Profile(Document):
    """A method with its parameters and cuts, for one model and budget.

    Attributes:
        version: of this document.
        method, parameters: as `wrap` takes them; "stages" where `stages` says them cut by cut.
        cuts: where to prune; empty: the method's default.
        stages: cuts with a method each, instead of `cuts`.
        keep, budget: what it was made for.
        adaptive: how the budget follows each picture around `keep`; None: every picture keeps as much.
        model: fingerprint of the model; "" for one that was published without weights at hand.
        family: of the model.
        name: of its checkpoint, for people; nothing is loaded by it.
        made, measured: where it comes from, and what is known of it; None: never measured here.
        hash: of the rest, SHA-256.
    """

    version: Literal[1] = 1
    method: Name
    parameters: dict[Name, Value] = Field(default_factory=dict, max_length=64)
    cuts: tuple[ProfileCut, ...] = Field(default=(), max_length=64)
    stages: tuple[ProfileStage, ...] = Field(default=(), max_length=64)
    keep: Share | Count
    budget: Literal["average", "after_cut"] = "average"
    adaptive: ProfileAdaptive | None = None
    model: Fingerprint = ""
    family: Name | None = None
    name: Line = ""
    made: Made = Field(default_factory=Made)
    measured: Measured | None = None
    hash: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""

    @model_validator(mode="after")
    def _check_cuts(self) -> Profile:
        if any(cut.keep is None for cut in (*self.cuts[:-1], *self.stages[:-1])):
            raise ValueError("only the last cut can be left to the budget")
        if self.adaptive is not None and not isinstance(self.keep, float):
            raise ValueError("an adaptive budget has a share as its mean")
        if (self.method == STAGES) != bool(self.stages) or (self.stages and (self.cuts or self.parameters)):
            raise ValueError("stages go with method 'stages', and say cuts and parameters themselves")
        return self

    @model_validator(mode="after")
    def _check_hash(self) -> Profile:
        if self.hash and self.hash != self.content_hash():
            raise ValueError("the hash is not that of the content: the file was changed after it was made")
        return self

    def check(self) -> None:
        """Refuse parameters that the method does not take: a profile says nothing else, least of all of itself.

        Raises:
            ConfigError: no such method or parameter, or a value that it refuses.
        """
        for own in self.stages or (self,):
            made = make_method(own.method, dict(own.parameters))
            if isinstance(made, NoPruning):
                raise ConfigError("a profile for method 'none' says nothing")

    def content_hash(self) -> str:
        """SHA-256 of everything but `hash`, as canonical JSON."""
        # Profiles made before there were stages, names and adaptive budgets keep their hash.
        absent = {name for name in ("stages", "name", "adaptive") if not getattr(self, name)}
        content = self.model_dump(mode="json", exclude={"hash", *absent})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sealed(self) -> Profile:
        """The same with its hash."""
        return self.model_copy(update={"hash": self.content_hash()})

    def arguments(self, keep: float | int | None = None) -> dict[str, Any]:
        """As keyword arguments of `wrap`.

        Args:
            keep: another budget; the shares of its cuts are scaled to it and the last is solved anew: for a smaller one
                what is kept, for a larger one what is dropped, so that every budget can be met. Between a fraction and
                a count nothing can be scaled: the method's default cuts are taken, of stages the first alone.
        """
        own: Sequence[ProfileCut] = self.stages or self.cuts
        cuts = [(cut.layer, cut.keep) for cut in own] or None
        if keep is not None and keep != self.keep and cuts is not None:
            scaled = scaled_shares([cut.keep for cut in own[:-1]], keep, self.keep)
            layers = [cut.layer for cut in own]
            cuts = None if scaled is None else [*zip(layers, scaled, strict=False), (layers[-1], None)]
        solved = cuts is None or cuts[-1][1] is None
        asked: Any = self.keep if keep is None else keep
        if self.adaptive is not None and asked == self.keep:  # calibrated for that mean, and no other
            asked = Adaptive(self.keep, **self.adaptive.model_dump())
        if self.stages:
            cuts = cuts or [(self.stages[0].layer, None)]
            return {
                "stages": [
                    (layer, stage.method, share, dict(stage.parameters))
                    for (layer, share), stage in zip(cuts, self.stages, strict=False)
                ],
                "keep": asked if solved else None,
                "budget": self.budget,
            }
        return {
            "method": self.method,
            "keep": asked if solved else None,
            "cuts": cuts,
            "budget": self.budget,
            **self.parameters,
        }

    def save(self, path: str | Path) -> Path:
        """Write it, sealed, as JSON.

        Raises:
            ConfigError: the file cannot be written.
        """
        path = given_path(path)
        write_document(self.sealed(), path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read one; nothing in it is ever executed.

        Raises:
            ConfigError: no such file, or anything in it that is not as it must be: an unknown field, a wrong type, a
                number that is none, a wrong hash; names the file and the field.
        """
        path = given_path(path)
        found = read_document(cls, path, "pruning profile")
        try:
            found.check()
        except ConfigError as error:
            raise ConfigError(f"{path} is no pruning profile: {error}") from None
        if not found.hash:
            raise ConfigError(
                f"{path} is no pruning profile (hash: missing); make it with Profile.save or tokenprune tune"
            )
        return found

    def push_to_hub(self, repo_id: str, file: str = hub.FILE, **options: Any) -> str:
        """Put it, sealed, into a model repository of the Hugging Face hub; see `tokenprune.profiles.hub.upload`."""
        return hub.upload(self.sealed().model_dump_json(indent=1).encode(), repo_id, file, **options)

    @classmethod
    def from_hub(
        cls, repo_id: str, file: str = hub.FILE, *, revision: str | None = None, **options: Any
    ) -> Profile:
        """Read one from a repository; errors as for `load`, and see `tokenprune.profiles.hub.download`."""
        return cls.load(hub.download(repo_id, file, revision, **options))

    @classmethod
    def published(cls, name: str) -> Profile:
        """A preset from a paper, untested here: wrap takes it with allow_mismatch=True.

        Raises:
            ConfigError: no such preset; names those there are.
        """
        names = sorted(path.stem for path in PRESETS.glob("*.json"))
        if name not in names:
            raise ConfigError(f"there is no published profile {name!r}; choose one of {', '.join(names)}")
        return cls.load(PRESETS / f"{name}.json")
