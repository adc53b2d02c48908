"""Exact tests against scipy and against counting by hand; intervals that agree with their test."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from loopmdm.analysis.numbers.contrasts import contrast, holm, rank_p, shares, shares_p, shift, welch

DRAWN = np.random.default_rng(0)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 5), (7, 10), (1, 4)])
def test_without_ties_the_rank_test_is_scipys(n, m):
    for _ in range(5):
        ours, theirs = DRAWN.normal(size=n), DRAWN.normal(0.7, size=m)
        expected = stats.mannwhitneyu(ours, theirs, method="exact").pvalue
        assert rank_p(ours, theirs) == pytest.approx(expected, abs=1e-12)


def test_with_ties_and_censored_values_it_counts_every_deal():
    ours, theirs = [1.0, 2.0, np.inf, np.inf], [2.0, 3.0, 3.0, np.inf, 0.5]
    pooled = np.array([*ours, *theirs])
    ranks = stats.rankdata(pooled)
    middle, seen = len(ours) * ranks.mean(), abs(ranks[:4].sum() - len(ours) * ranks.mean())
    deals = [abs(ranks[list(deal)].sum() - middle) >= seen - 1e-9 for deal in combinations(range(9), 4)]
    assert rank_p(ours, theirs) == pytest.approx(np.mean(deals))


def test_apart_as_far_as_can_be():
    assert rank_p(range(5), range(10, 15)) == pytest.approx(2 / 252)
    assert rank_p([1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0
    assert np.isnan(rank_p([], [1.0]))


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 5), (4, 4), (7, 10)])
def test_the_interval_holds_the_shifts_that_the_test_does_not_refuse(n, m):
    for _ in range(5):
        ours, theirs = DRAWN.normal(size=n), DRAWN.normal(0.5, size=m)
        middle, low, high = shift(ours, theirs)
        assert low <= middle <= high
        inside, step = np.nextafter(low, high) + 1e-9, 1e-6
        assert rank_p(ours - inside, theirs) > 0.05 >= rank_p(ours - (low - step), theirs)
        assert rank_p(ours - (high - 1e-9), theirs) > 0.05 >= rank_p(ours - (high + step), theirs)


def test_arms_that_are_too_small_have_no_interval():
    middle, low, high = shift([1.0, 2.0, 3.0], [11.0, 12.0, 13.0])
    assert middle == -10 and np.isnan([low, high]).all()  # the smallest p is 0.1
    assert np.isfinite(shift([1.0, 2.0, 3.0], [11.0, 12.0, 13.0, 14.0, 15.0])[1:]).all()
    assert np.isnan(shift([], [1.0])).all()


def test_the_interval_of_a_shift_covers():
    draw, covered = np.random.default_rng(1), 0
    for _ in range(400):
        _, low, high = shift(draw.normal(1.0, size=5), draw.normal(size=6))
        covered += low <= 1.0 <= high
    assert 0.93 <= covered / 400 <= 0.985  # 96.97% by the exact distribution


def test_difference_of_shares_is_newcombes():
    """His example: 56 of 70 against 48 of 80, 0.2 (0.0524, 0.3339)."""
    ours, theirs = [True] * 56 + [False] * 14, [True] * 48 + [False] * 32
    assert shares(ours, theirs) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert shares([True] * 5, [True] * 5)[0] == 0.0
    assert shares([True] * 5, [False] * 5)[1] > 0
    assert shares_p([True] * 5, [False] * 5) == pytest.approx(2 / 252) and shares_p([True] * 5, [True] * 5) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx([0.03, 0.06, 0.06, np.nan], nan_ok=True)
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]).shape == (0,)


def test_welch_is_scipys():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.5, 0.25, 0.1])
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert welch(a, b) == pytest.approx((a.mean() - b.mean(), *interval))
    difference, low, high = welch(a[:1], b)
    assert difference == pytest.approx(1 - b.mean()) and np.isnan(low) and np.isnan(high)


def test_contrasts_with_groups_that_do_not_vary_are_those_of_the_others():
    a, b, constant = np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.5, 0.25, 0.1]), np.zeros(3)
    assert contrast((a, b, constant, constant), (1, -1, -1, 1)) == pytest.approx(contrast((a, b)))
    assert contrast((a,), (1,)) == pytest.approx((a.mean(), stats.sem(a), 2))
    assert contrast((constant, constant)) == (0.0, 0.0, 4.0)
