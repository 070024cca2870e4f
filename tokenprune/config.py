"""What a wrapped model does at each call; `settle.py` makes it of what was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from tokenprune.arguments import Arguments
from tokenprune.budget import Cut
from tokenprune.methods import Method
from tokenprune.methods.importance import grey_entropy
from tokenprune.methods.seen import Needs
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
