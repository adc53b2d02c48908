"""Moments equal the two-pass statistics, and their shards add up."""

import numpy as np
import pytest

from loopmdm.analysis.numbers import stats
from loopmdm.analysis.numbers.moments import Moments, propagated
from loopmdm.model.errors import UsageError


def values(n=30, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(5, 1, size=(n, 3, 2))
    x[generator.random((n, 3)) < 0.2] = np.nan
    return x


@pytest.mark.parametrize("clusters", [None, np.arange(30) % 7])
def test_means_and_errors_equal_the_two_pass_ones(clusters):
    x, moments = values(), Moments()
    moments.add(x, clusters)
    mean, error, n = stats.mean_and_error(x, clusters)
    np.testing.assert_allclose(moments.mean, mean)
    np.testing.assert_allclose(np.sqrt(np.diagonal(moments.covariance, axis1=-2, axis2=-1)), error)
    np.testing.assert_array_equal(moments.n, n[..., 0])
    ratio = moments.mean[..., 0] / moments.mean[..., 1]
    gradient = np.stack([1 / moments.mean[..., 1], -ratio / moments.mean[..., 1]], axis=-1)
    influence = (x[..., 0] - ratio * x[..., 1]) / moments.mean[..., 1]
    np.testing.assert_allclose(
        propagated(gradient, moments.covariance), stats.influence_error(influence, clusters)
    )


@pytest.mark.parametrize("clusters", [None, np.arange(30) % 7])
def test_shards_add_up(clusters):
    x, whole = values(), Moments()
    whole.add(x, clusters)
    merged = Moments()
    for span in (slice(0, 4), slice(4, 5), slice(5, 30)):
        shard = Moments()
        shard.add(x[span], None if clusters is None else clusters[span])
        merged.merge(shard)
    merged.merge(Moments())
    np.testing.assert_allclose(merged.mean, whole.mean)
    np.testing.assert_allclose(merged.covariance, whole.covariance)
    np.testing.assert_array_equal(merged.units, whole.units)


def test_a_large_offset_does_not_drown_the_variance():
    x, moments = 1e6 + values(), Moments()
    for row in x:
        moments.add(row[None])
    expected = stats.mean_and_error(x)[1]
    np.testing.assert_allclose(np.sqrt(np.diagonal(moments.covariance, axis1=-2, axis2=-1)), expected, rtol=1e-6)


def test_one_unit_has_no_error_and_nothing_has_no_mean():
    moments = Moments()
    moments.add(np.array([[[1.0, 2.0]], [[np.nan, 1.0]]]))
    assert moments.n.tolist() == [1] and np.isnan(moments.covariance).all()
    clustered = Moments()
    clustered.add(np.ones((4, 1, 1)), np.zeros(4))
    assert np.isnan(clustered.covariance).all() and clustered.mean.item() == 1
    empty = Moments()
    empty.add(np.full((2, 1, 1), np.nan))
    assert np.isnan(empty.mean).all() and empty.n.tolist() == [0]


def test_intervals_cover_the_truth():
    generator, inside = np.random.default_rng(1), 0
    for _ in range(500):
        moments = Moments()
        moments.add(generator.exponential(size=(120, 1)))
        error = float(np.sqrt(moments.covariance.item()))
        inside += abs(moments.mean.item() - 1) < stats.t95(120) * error
    assert 0.93 <= inside / 500 <= 0.97


def test_misuse_is_refused():
    moments = Moments()
    moments.add(np.ones((2, 1, 1)))
    with pytest.raises(UsageError, match="all or none"):
        moments.add(np.ones((2, 1, 1)), np.arange(2))
    other = Moments()
    with pytest.raises(UsageError, match="one per sequence"):
        other.add(np.ones((2, 1, 1)), np.arange(3))
    clustered = Moments()
    clustered.add(np.ones((2, 1, 1)), np.arange(2))
    with pytest.raises(UsageError, match="all or none"):
        moments.merge(clustered)
