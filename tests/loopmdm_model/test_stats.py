import numpy as np
import pytest

from loopmdm.model import stats


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
    value, error = stats.log_ratio_and_error(above, ones, below, ones)
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
    value, error = stats.log_ratio_and_error(ones, ones, ones, zeros)
    assert np.isnan(value).all() and np.isnan(error).all()


def test_wilson_interval_by_hand():
    low, high = stats.wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert stats.wilson(0, 10)[0] == 0 and stats.wilson(10, 10)[1] == 1
