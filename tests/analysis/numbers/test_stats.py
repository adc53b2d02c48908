"""Errors cover the truth, and intervals are the textbook's."""

import ast
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as distributions

from loopmdm.analysis.numbers import stats
from loopmdm.model import means

ROOT = Path(__file__).parents[3]


def test_mean_and_error_by_hand_and_with_gaps():
    mean, error, n = stats.mean_and_error(np.array([1.0, 2.0, 3.0, np.nan]))
    assert (mean, n) == (2.0, 3) and error == pytest.approx(1 / 3**0.5)
    mean, error, n = stats.mean_and_error(np.array([np.nan, np.nan]))
    assert np.isnan(mean) and np.isnan(error) and n == 0
    assert np.isnan(stats.mean_and_error(np.array([4.0]))[1])


def test_clusters_of_identical_copies_do_not_add_information():
    generator = np.random.default_rng(0)
    values = generator.normal(size=40)
    copies, clusters = np.repeat(values, 5), np.repeat(np.arange(40), 5)
    expected = stats.mean_and_error(values)[1]
    np.testing.assert_allclose(stats.mean_and_error(copies, clusters)[1], expected)
    assert stats.mean_and_error(copies)[1] < 0.5 * expected


def test_log_ratio_of_means_covers_the_truth():
    generator = np.random.default_rng(1)
    above, below = (generator.gamma(4, scale, size=(120, 3000)) for scale in (0.1, 0.2))
    ones = np.ones_like(above)
    value, influence = stats.log_ratio([(above, 1), (ones, -1), (below, -1), (ones, 1)])
    error = stats.influence_error(influence)
    inside = abs(value - np.log(0.5)) < stats.Z95 * error
    assert 0.93 <= inside.mean() <= 0.97


def test_means_of_clusters_and_weighted_means_cover_the_truth():
    generator = np.random.default_rng(2)
    shared = np.repeat(generator.normal(size=(100, 3000)), 3, axis=0)
    values = shared + generator.normal(size=shared.shape)
    clusters = np.repeat(np.arange(100), 3)
    mean, error, _ = stats.mean_and_error(values, clusters)
    assert 0.93 <= (abs(mean) < stats.t95(100) * error).mean() <= 0.97
    careless = stats.mean_and_error(values)[1]
    assert (abs(mean) < stats.Z95 * careless).mean() < 0.9
    weights = generator.integers(1, 20, size=len(values)).astype(float)
    mean, error, _ = stats.weighted_mean_and_error(values, weights, clusters)
    assert 0.93 <= (abs(mean) < stats.t95(100) * error).mean() <= 0.97


def test_empty_denominators_are_nan():
    zeros, ones = np.zeros((5, 1)), np.ones((5, 1))
    value, influence = stats.log_ratio([(ones, 1), (ones, -1), (ones, -1), (zeros, 1)])
    assert np.isnan(value).all() and np.isnan(stats.influence_error(influence)).all()


def test_wilson_interval_by_hand():
    low, high = stats.wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert stats.wilson(0, 10)[0] == 0 and stats.wilson(10, 10)[1] == 1


@pytest.mark.parametrize("units", [2, 3, 8, 1000, float("inf")])
def test_t95_is_students_and_bonferronis_over_several_tests(units):
    assert stats.t95(units) == pytest.approx(distributions.t.interval(0.95, units - 1)[1], rel=1e-12)
    assert stats.t95(units, 20) == pytest.approx(distributions.t.interval(1 - 0.05 / 20, units - 1)[1], rel=1e-12)
    assert np.isnan(stats.t95(1)) and stats.t95(float("inf")) == pytest.approx(stats.Z95)


def test_the_mean_over_seeds_by_hand():
    mean, low, high = stats.over_seeds(np.array([1.0, 2.0, 6.0]))
    half = 4.302653 * (7 / 3) ** 0.5  # t of two degrees of freedom; the variance is 7, of the mean a third of it
    assert (mean, low, high) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-6)
    assert stats.over_seeds(np.array([2.0]), (1.0, 5.0)) == (2.0, 1.0, 5.0)
    assert np.isnan(stats.over_seeds(np.array([2.0]))[1:]).all()
    assert stats.over_seeds(np.array([0.5, 0.5])) == (0.5, 0.5, 0.5)
    assert np.isnan(stats.over_seeds(np.array([1.0, np.nan, 2.0]))).all()


def test_each_statistic_stands_in_one_place():
    assert stats.mean_and_error is means.mean_and_error
    names = ("t.ppf", "influence_error", "half_width", "over_seeds", "holm")
    homes: dict[str, set[str]] = {name: set() for name in names}
    for folder in ("loopmdm_model", "analysis"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("ppf", "isf", "stdtrit"):
                    homes["t.ppf"].add(path.name)
                if isinstance(node, ast.FunctionDef) and node.name in homes:
                    homes[node.name].add(path.name)
    assert homes["t.ppf"] == homes["over_seeds"] == {"stats.py"}
    assert homes["holm"] == {"contrasts.py"}
    assert homes["influence_error"] == {"means.py"} and homes["half_width"] == {"estimate.py"}
