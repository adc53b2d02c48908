"""Means and standard errors over sequences, or over clusters of sequences that share a document.

Every statistic is a mean of per-sequence numbers or a smooth function of such means; its error comes
from the influence of each sequence (the delta method), summed within clusters first.
"""

import numpy as np
from numpy.typing import NDArray

from loopmdm.model.errors import UsageError

Z95 = 1.959963984540054
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


def log_ratio_and_error(
    above: Array, above_chance: Array, below: Array, below_chance: Array, clusters: NDArray | None = None
) -> tuple[Array, Array]:
    """log[(mean above / mean above_chance) / (mean below / mean below_chance)] and its error.

    All are [n, ...] per sequence. NaN where a chance is zero or a mass vanishes.
    """
    parts = [(above, 1), (above_chance, -1), (below, -1), (below_chance, 1)]
    value, influence = np.zeros(above.shape[1:]), np.zeros(above.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        for part, sign in parts:
            mean, _, _ = mean_and_error(part)
            value = value + sign * np.log(mean)
            influence = influence + sign * (part - mean) / mean
    value = np.where(np.isfinite(value), value, np.nan)
    error = influence_error(influence, clusters)
    return value, np.where(np.isfinite(value), error, np.nan)


def t95(n_units: int) -> float:
    """Half-width of a 95% interval in standard errors, by Student's t over independent units; NaN below two."""
    return _t_quantile(n_units - 1) if n_units > 1 else float("nan")


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else float(centre - half)
    return low, 1.0 if successes == n else float(centre + half)


def welch(ours: Array, theirs: Array) -> tuple[float, float, float]:
    """Difference of two means with Welch's 95% interval; NaN bounds for fewer than two values on a side."""
    difference = float(np.mean(ours) - np.mean(theirs))
    if min(len(ours), len(theirs)) < 2:
        return difference, float("nan"), float("nan")
    a, b = np.var(ours, ddof=1) / len(ours), np.var(theirs, ddof=1) / len(theirs)
    if a + b == 0:
        return difference, difference, difference
    freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))
    half = float(_t_quantile(float(freedom)) * np.sqrt(a + b))
    return difference, difference - half, difference + half


def interaction(a: Array, b: Array, c: Array, d: Array) -> tuple[float, float, float]:
    """(a - b) - (c - d) of the means of four independent groups, with Welch's 95% interval.

    For arms of a 2 x 2: each is [seed], of two values at least.
    """
    groups = [np.asarray(group, dtype=float) for group in (a, b, c, d)]
    estimate = float(sum(sign * group.mean() for sign, group in zip((1, -1, -1, 1), groups, strict=True)))
    parts = np.array([group.var(ddof=1) / len(group) for group in groups])
    if parts.sum() == 0:
        return estimate, estimate, estimate
    freedom = parts.sum() ** 2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    half = float(_t_quantile(freedom) * parts.sum() ** 0.5)
    return estimate, estimate - half, estimate + half


def _t_quantile(freedom: float | int) -> float:
    """The 97.5% quantile of Student's t; scipy's distributions take half a second to import, so late."""
    from scipy import stats as distributions

    return float(distributions.t.ppf(0.975, freedom))
