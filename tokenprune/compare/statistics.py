"""Accuracies and their paired differences: both sides answered the same questions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Outcomes = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies in percentage points, with its 95 % interval.

    Attributes:
        points, low, high: ours minus theirs.
        p: of a Wilcoxon signed-rank test over clusters, two-sided; not corrected for how many were made.
    """

    points: float
    low: float
    high: float
    p: float

    @property
    def word(self) -> str:
        """ "beats", "loses to", or "is level with" where the interval contains 0."""
        return "beats" if self.low > 0 else "loses to" if self.high < 0 else "is level with"

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(
    ours: Outcomes, theirs: Outcomes, clusters: Sequence[Hashable], resamples: int = 2000, seed: int = 0
) -> Difference:
    """Mean of ours - theirs, with a bootstrap interval and a signed-rank test, both over clusters.

    Questions about one picture stand or fall together, so pictures are drawn, not questions.

    Args:
        ours, theirs: (n,) outcomes in [0, 1]; a mean over seeds is one.
        clusters: n labels; equal ones are drawn together.
        resamples, seed: of the bootstrap.
    """
    from scipy import stats

    delta = ours.astype(np.float64) - theirs.astype(np.float64)
    low, high = mean_interval(delta, clusters, resamples, seed)
    sums, _ = _by_cluster(delta, clusters)
    p = 1.0
    if sums.any():
        p = float(stats.wilcoxon(sums, zero_method="pratt").pvalue)
    return Difference(100 * float(delta.mean()), 100 * low, 100 * high, p)


def mean_interval(
    values: Outcomes, clusters: Sequence[Hashable], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of (n,) values by a bootstrap over clusters; a single cluster has none but its mean."""
    from scipy import stats

    sums, sizes = _by_cluster(values.astype(np.float64), clusters)
    mean = float(sums.sum() / sizes.sum())
    if len(sums) < 2 or np.ptp(sums / sizes) == 0:
        return mean, mean
    found = stats.bootstrap(
        (sums, sizes),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=500,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def wilson(outcomes: Outcomes, clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % Wilson interval of a share of (n,) outcomes, as if there were one per cluster: for shares of 0 and 1, of
    which a bootstrap knows nothing."""
    from scipy import stats

    number = len(set(clusters))
    found = stats.binomtest(round(float(outcomes.mean()) * number), number).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _by_cluster(values: FloatArray, clusters: Sequence[Hashable]) -> tuple[FloatArray, FloatArray]:
    """Sums of (n,) values and their counts, cluster by cluster."""
    labels: dict[Hashable, int] = {}
    index = np.array([labels.setdefault(c, len(labels)) for c in clusters])
    sums = np.bincount(index, weights=values).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)
