"""What is done with means: ratios of them, intervals, and means over training seeds.

Means and errors over sequences are `loopmdm.model.means`', and can be had here, too. Intervals are 95% ones, by
Student's t over independent units wherever a spread is estimated.
"""

from collections.abc import Iterable

import numpy as np

from loopmdm.model.means import Array, count_units, influence_error, mean_and_error, weighted_mean_and_error

__all__ = [
    "Z95",
    "count_units",
    "influence_error",
    "log_ratio",
    "mean_and_error",
    "over_seeds",
    "ratio_of_means",
    "t95",
    "t_quantile",
    "weighted_mean_and_error",
    "wilson",
]

Z95 = 1.959963984540054


def log_ratio(parts: Iterable[tuple[Array, int]]) -> tuple[Array, Array]:
    """Sum of sign * log(mean) [..] over (values [n, ..], sign), and each sequence's influence on it [n, ..].

    With signs 1 and -1 the log of a ratio of means. NaN where a mean vanishes.
    """
    value, influence = np.asarray(0.0), np.asarray(0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        for part, sign in parts:
            mean, _, _ = mean_and_error(part)
            value = value + sign * np.log(mean)
            influence = influence + sign * (part - mean) / mean
    return np.where(np.isfinite(value), value, np.nan), np.asarray(influence)


def ratio_of_means(
    top: Array, bottom: Array, clusters: Array | None = None, least: float = Z95
) -> tuple[float, float, int]:
    """Mean of `top` [n] over that of `bottom`, its error (delta method), and n; of the rows where both are known.

    NaN unless the lower mean exceeds 0 by more than `least` of its standard errors: a ratio to nothing is none.
    """
    known = np.isfinite(top) & np.isfinite(bottom)
    upper, _, n = mean_and_error(np.where(known, top, np.nan))
    lower, error, _ = mean_and_error(np.where(known, bottom, np.nan), clusters)
    if not lower > max(least * np.nan_to_num(error), 1e-9):
        return float("nan"), float("nan"), int(n)
    influence = np.where(known, (top - upper / lower * bottom) / lower, np.nan)
    return float(upper / lower), float(influence_error(influence, clusters)), int(n)


def t_quantile(freedom: int | float, share: float = 0.975) -> float:
    """Quantile of Student's t; scipy's distributions take half a second to import, so late."""
    from scipy import stats as distributions

    return float(distributions.t.ppf(share, freedom))


def t95(n_units: int | float, tests: int = 1) -> float:
    """Half-width of a 95% interval in standard errors over independent units; NaN below two.

    Of several `tests` all intervals together hold at 95% (Bonferroni's).
    """
    return t_quantile(n_units - 1, 1 - 0.025 / tests) if n_units > 1 else float("nan")


def over_seeds(values: Array, alone: tuple[float, float] = (np.nan, np.nan)) -> tuple[float, float, float]:
    """Mean over training seeds and the bounds of its 95% interval; of one seed the bounds are those given.

    All NaN where a seed has no value: the others are another population.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, *alone
    half = t95(len(values)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else float(centre - half)
    return low, 1.0 if successes == n else float(centre + half)
