"""How many visual tokens each cut keeps: pure arithmetic on host integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenprune.errors import BudgetError, ConfigError

Keep = float | int
BudgetMeaning = Literal["average", "after_cut"]


@dataclass(frozen=True)
class Cut:
    """Prune on entering decoder layer `layer`; 0 is before the LLM.

    Args:
        layer: decoder layer whose input is the first to be shortened.
        keep: what remains of an image's *original* tokens: a float in (0, 1] is a fraction, an int a count.
            None (the last cut only) is solved from the overall budget.
    """

    layer: int
    keep: Keep | None = None


@dataclass(frozen=True)
class Escalate:
    """`wrap(model, keep=0.11, escalate=(0.33, 1.5))`: unsure prompts are prefilled again with a larger budget.

    Args:
        keep: share of the visual tokens that an unsure row keeps then.
        entropy: of the first token's distribution, in nats, above which a row is unsure.

    Raises:
        ConfigError: numbers that cannot be.
    """

    keep: float
    entropy: float

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, float) or not 0 < self.keep <= 1:
            raise ConfigError(f"escalate takes a share in (0, 1] to keep, not {self.keep!r}")
        number = not isinstance(self.entropy, bool) and isinstance(self.entropy, int | float)
        if not number or not 0 <= self.entropy < math.inf:
            raise ConfigError(f"escalate takes an entropy in nats, 0 or more, not {self.entropy!r}")


def check_keep(keep: object, what: str = "keep") -> Keep:
    """Return `keep` if it is a float in (0, 1] or an int >= 1 (bool and NaN are refused).

    Raises:
        ConfigError: anything else.
    """
    rule = f"{what} must be a float in (0, 1] (a fraction) or an int >= 1 (tokens per image)"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise ConfigError(f"{rule}, not {keep!r}")
    if isinstance(keep, int):
        if keep < 1:
            raise BudgetError(f"{rule}; {keep} keeps nothing")
    elif not 0 < keep <= 1:  # NaN fails this too
        raise BudgetError(f"{rule}; got {keep}")
    return keep


def tokens(keep: Keep, n: int) -> float:
    """`keep` as a number of tokens of an image that has `n` (not rounded); a count above `n` is all of them."""
    return keep * n if isinstance(keep, float) else float(min(keep, n))


def _floor(x: float) -> int:
    # 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996: rounding noise must not cost a token.
    return math.floor(x + 1e-9)


def average_floor(layer: int, num_layers: int, n: int) -> float:
    """Smallest average retention (fraction of `n`) a single cut at `layer` can reach: (K n + (L - K)) / (L n)."""
    return (layer * n + (num_layers - layer)) / (num_layers * n)


def plan_counts(
    n: int,
    num_layers: int,
    cuts: Sequence[Cut],
    keep: Keep | None,
    budget: BudgetMeaning = "average",
    nearest: bool = False,
) -> list[int]:
    """Tokens one image keeps after each cut.

    With `budget="average"` the mean over decoder layers is the target and the last cut without a `keep` of its own
    is solved for it, kept = int((L * target - sum of earlier stages) / (L - K)), as EntropyPrune's release does
    (arXiv 2602.17196). A cut's own share is rounded to the nearest token, as VFlowOpt's release does (arXiv
    2508.05211); what earlier cuts lose by it, less than a token on average, may stay unspent.
    With `"after_cut"` the target is what remains after that cut.

    Args:
        n: prunable visual tokens of the image.
        num_layers: decoder layers L.
        cuts: in ascending order of layer.
        keep: the budget; None when every cut says its own.
        budget: the meaning of `keep`.
        nearest: where the cuts cannot reach the target, as near as they come, instead of an error.

    Returns:
        One count per cut, non-increasing, each in [1, n].

    Raises:
        BudgetError: a growing schedule, or a target that the cuts cannot reach.
    """
    counts: list[int] = []
    spent, previous, start = 0.0, n, 0
    for i, cut in enumerate(cuts):
        spent += (cut.layer - start) * previous
        start = cut.layer
        if cut.keep is not None:
            count = max(1, _floor(tokens(cut.keep, n) + 0.5))
        else:
            assert keep is not None  # checked when the configuration was made
            count = _solve(n, num_layers, cut.layer, tokens(keep, n), spent, previous, budget, i > 0, nearest)
        if count > previous:
            if not nearest:
                raise BudgetError(
                    f"the cut at layer {cut.layer} would keep {count} of {n} tokens, more than the {previous} left by "
                    f"the cut before it; make the schedule non-increasing"
                )
            count = previous
        counts.append(count)
        previous = count
    return counts


def _solve(
    n: int,
    num_layers: int,
    layer: int,
    target: float,
    spent: float,
    previous: int,
    budget: BudgetMeaning,
    rounded: bool,
    nearest: bool,
) -> int:
    if budget == "after_cut":
        return max(1, _floor(target))
    rest = num_layers - layer
    low, high = (spent + rest) / num_layers, (spent + rest * previous) / num_layers
    if rounded and 0 < target - high < 1 - 1e-9:  # what earlier cuts lost by rounding, less than one token
        return previous
    if target < low - 1e-9 or target > high + 1e-9:
        # A single image token cannot be halved: the budget still rounds to one token.
        if n == 1 or (layer == 0 and target < 1):
            return 1
        if nearest:
            return 1 if target < low else previous
        raise BudgetError(
            f"an average of {target:g} of {n} tokens ({target / n:.1%}) cannot be reached by a cut at layer {layer} of "
            f"{num_layers}: the reachable range is {low:.4g} to {high:.4g} tokens ({low / n:.1%} to {high / n:.1%}); "
            f"cut earlier, keep more, or use budget='after_cut'"
        )
    return max(1, _floor((num_layers * target - spent) / rest))


def average_kept(n: int, num_layers: int, cuts: Sequence[Cut], counts: Sequence[int]) -> float:
    """Mean over the decoder layers of an image's remaining tokens."""
    total, previous, start = 0, n, 0
    for cut, count in zip(cuts, counts, strict=True):
        total += (cut.layer - start) * previous
        start, previous = cut.layer, count
    return (total + (num_layers - start) * previous) / num_layers


def scaled_shares(shares: Sequence[Keep | None], keep: Keep, made_for: Keep) -> list[Keep] | None:
    """What cuts keep of the original tokens, made for one budget, at another; None between fractions and counts.

    For a smaller budget what is kept is scaled, for a larger one what is dropped, so that every budget can be met.
    """
    if type(keep) is not type(made_for):
        return None
    known = [share for share in shares if share is not None]  # only a last one has none
    if isinstance(keep, float) and keep > made_for:
        dropped = (1 - keep) / (1 - made_for)
        return [1 - (1 - share) * dropped for share in known]
    times = keep / made_for
    return [max(1, round(share * times)) if isinstance(share, int) else share * times for share in known]
