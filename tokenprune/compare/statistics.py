"""Paired differences of accuracy: both sides answered the same questions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies in percentage points, with its 95 % interval."""

    points: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """ "beats", "loses to", or "is level with" where the interval contains 0."""
        return "beats" if self.low > 0 else "loses to" if self.high < 0 else "is level with"

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(
    ours: npt.NDArray[np.generic],
    theirs: npt.NDArray[np.generic],
    clusters: Sequence[Hashable],
    resamples: int = 4000,
    seed: int = 0,
) -> Difference:
    """Mean of ours - theirs with a bootstrap interval over clusters.

    Questions about one scene stand or fall together, so scenes are drawn, not questions.

    Args:
        ours, theirs: (n,) outcomes in [0, 1]; a mean over seeds is one.
        clusters: n labels; equal ones are drawn together.
        resamples, seed: of the bootstrap.
    """
    delta = ours.astype(np.float64) - theirs.astype(np.float64)
    labels: dict[Hashable, int] = {}
    index = np.array([labels.setdefault(c, len(labels)) for c in clusters])
    sums = np.bincount(index, weights=delta).astype(np.float64)
    sizes = np.bincount(index).astype(np.float64)
    means = _bootstrap(sums, sizes, resamples, np.random.default_rng(seed))
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(100 * float(delta.mean()), 100 * float(low), 100 * float(high))


def _bootstrap(sums: FloatArray, sizes: FloatArray, resamples: int, rng: np.random.Generator) -> FloatArray:
    n = len(sums)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(0, n, n)
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    return np.array(means)
