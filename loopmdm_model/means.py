"""Means over sequences, and their standard errors over sequences or over clusters of them that share a document.

The error of a mean, or of a smooth function of means, comes from the influence of each sequence on it (the delta
method), summed within clusters first. What else is done with means is `loopmdm.analysis.numbers.stats`.
"""

import numpy as np
from numpy.typing import NDArray

from loopmdm.model.errors import UsageError

Array = NDArray


def influence_error(influence: Array, clusters: NDArray | None = None) -> Array:
    """Standard error of a mean from per-sequence influences [n, ...]; NaN for fewer than two units.

    NaN influences are sequences that do not count.
    """
    if clusters is not None and len(clusters) != len(influence):
        raise UsageError(f"clusters must name one per sequence: {len(influence)} expected, got {len(clusters)}")
    known = np.isfinite(influence)
    n = np.asarray(known.sum(axis=0))
    influence = np.where(known, influence, 0.0)
    if clusters is not None:
        _, index = np.unique(clusters, return_inverse=True)
        summed = np.zeros((index.max() + 1, *influence.shape[1:]))
        np.add.at(summed, index, influence)
        present = np.zeros(summed.shape, dtype=bool)
        np.logical_or.at(present, index, known)
        influence, units = summed, present.sum(axis=0)
    else:
        units = n
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(units / (units - 1) * (influence**2).sum(axis=0)) / n
    return np.asarray(np.where(units > 1, error, np.nan))


def count_units(n: int, clusters: Array | None) -> int:
    """How many of `n` sequences are independent: all, or the clusters they fall into."""
    return n if clusters is None else len(np.unique(clusters))


def mean_and_error(values: Array, clusters: NDArray | None = None) -> tuple[Array, Array, Array]:
    """Mean, standard error and n over the first axis, ignoring NaN; NaN with n = 0 where nothing is known."""
    known = np.isfinite(values)
    n = np.asarray(known.sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0.0).sum(axis=0) / n
    mean = np.asarray(np.where(n > 0, mean, np.nan))
    return mean, influence_error(values - mean, clusters), n


def weighted_mean_and_error(
    values: Array, weights: Array, clusters: NDArray | None = None
) -> tuple[Array, Array, Array]:
    """As `mean_and_error`, for values [n, ...] that count `weights` [n]: a ratio of means, and its error."""
    weights = weights.reshape(-1, *[1] * (values.ndim - 1))
    known = np.isfinite(values) & (weights > 0)
    n = np.asarray(known.sum(axis=0))
    heavy = np.where(known, weights, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, heavy * np.where(known, values, 0.0), 0.0).sum(axis=0) / heavy.sum(axis=0)
        influence = np.where(known, (values - mean) * heavy / (heavy.sum(axis=0) / n), np.nan)
    return np.asarray(mean), influence_error(influence, clusters), n
