"""Contract 15: what a budget means, on the numbers of the papers."""

from __future__ import annotations

import pytest

from tokenprune import BudgetError, ConfigError, Cut
from tokenprune.budget import average_floor, average_kept, check_keep, plan_counts


@pytest.mark.parametrize(("average", "kept"), [(192, 166), (128, 98), (64, 29)])
def test_entropyprune_release_arithmetic(average: int, kept: int) -> None:
    """L = 32, K = 2, N = 576: kept = int((L avg - K N) / (L - K)), arXiv 2602.17196's code."""
    assert plan_counts(576, 32, [Cut(2)], average) == [kept]
    assert plan_counts(576, 32, [Cut(2)], average / 576) == [kept]


def test_after_cut_is_literal() -> None:
    assert plan_counts(576, 32, [Cut(2)], 192, "after_cut") == [192]
    assert plan_counts(576, 32, [Cut(2)], 1, "after_cut") == [1]
    assert plan_counts(576, 32, [Cut(2)], 1.0, "after_cut") == [576]


def test_a_one_is_a_token_and_a_one_point_zero_is_everything() -> None:
    assert plan_counts(100, 10, [Cut(0)], 1) == [1]
    assert plan_counts(100, 10, [Cut(0)], 1.0) == [100]


def test_rounding_noise_costs_no_token() -> None:
    """0.29 * 100 is 28.999999999999996 in binary."""
    assert plan_counts(100, 10, [Cut(0)], 0.29) == [29]


def test_last_cut_is_solved_from_the_earlier_ones() -> None:
    """VFlowOpt's schedule for 28 layers, 9 / 9 / 10: (28 * 250 - 9 * 400 - 9 * 200) / 10 = 160."""
    cuts = [Cut(0, 400), Cut(9, 200), Cut(18)]
    counts = plan_counts(1000, 28, cuts, 0.25)
    assert counts == [400, 200, 160]
    assert average_kept(1000, 28, cuts, counts) == 250


def test_unreachable_names_the_reachable_range() -> None:
    """K = 2 of 16 with 144 tokens: (2 * 144 + 14) / (16 * 144) = 13.1 %."""
    assert average_floor(2, 16, 144) == pytest.approx(302 / 2304)
    with pytest.raises(BudgetError, match=r"13\.1% to 100\.0%"):
        plan_counts(144, 16, [Cut(2)], 0.11)
    assert plan_counts(144, 16, [Cut(2)], 302 / 2304) == [1]


def test_single_token_images_cannot_be_halved() -> None:
    assert plan_counts(1, 16, [Cut(2)], 0.25) == [1]


def test_more_tokens_than_there_are_and_growing_schedules() -> None:
    assert plan_counts(144, 16, [Cut(2)], 145) == [144]
    assert plan_counts(144, 16, [Cut(2, 200), Cut(4, 100)], None) == [144, 100]
    with pytest.raises(BudgetError, match="non-increasing"):
        plan_counts(144, 16, [Cut(1, 20), Cut(3, 40)], None)


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, float("nan"), float("inf"), True, "0.25", None])
def test_bad_keeps(keep: object) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        check_keep(keep)


def test_a_cuts_own_share_is_rounded_to_the_nearest_token() -> None:
    """VFlowOpt's first cut on LLaVA-OneVision's layouts: all tokens, and without the 81 newlines."""
    for n, kept in ((7371, 5332), (7290, 5273)):
        assert plan_counts(n, 28, [Cut(0, 0.72332)], None) == [kept]
