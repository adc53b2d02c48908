"""Arms of trained models compared: by means, by rank, by shares, with censored values; what many tests make of it.

Rank-sum tests are exact: all ways to deal the values out to the arms are counted. The shift between two arms is
the median of all differences (Hodges & Lehmann 1963), its interval the differences that the test does not refuse,
so interval and test agree. scipy's distributions take half a second to import, so late.
"""

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopmdm.analysis.numbers.stats import t_quantile, wilson

ALPHA = 0.05


def contrast(groups: Sequence[NDArray], signs: Sequence[int] = (1, -1)) -> tuple[float, float, float]:
    """Sum of sign * mean of independent groups [n] each, its standard error, Welch's degrees of freedom.

    Two groups: their difference; (1, -1, -1, 1): the interaction of a 2 x 2; one group and (1,): its mean. Each
    has two values at least.
    """
    estimate = float(sum(sign * np.mean(group) for sign, group in zip(signs, groups, strict=True)))
    parts = [float(np.var(group, ddof=1)) / len(group) for group in groups]
    loose = sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    freedom = sum(parts) ** 2 / loose if loose else float(sum(len(group) - 1 for group in groups))
    return estimate, float(np.sqrt(sum(parts))), freedom


def crossed(error: float, freedom: float, over_items: float, n_items: int) -> tuple[float, float]:
    """Standard error and degrees of freedom of a mean over seeds that were all read on the same few items.

    `error` with `freedom` is that over seeds, `over_items` that over `n_items` items of the mean over seeds. Their
    squares are added, with Satterthwaite's freedom: what seeds and items do together is then counted twice, on the
    safe side.
    """
    parts = np.array([error**2, over_items**2])
    loose = (parts**2 / np.array([freedom, n_items - 1])).sum()
    return float(np.sqrt(parts.sum())), float(parts.sum() ** 2 / loose) if loose else freedom


def welch(ours: NDArray, theirs: NDArray) -> tuple[float, float, float]:
    """Difference of two means with Welch's 95% interval; NaN bounds for fewer than two values on a side."""
    if min(len(ours), len(theirs)) < 2:
        return float(np.mean(ours) - np.mean(theirs)), float("nan"), float("nan")
    difference, error, freedom = contrast((ours, theirs))
    half = t_quantile(freedom) * error
    return difference, difference - half, difference + half


def rank_p(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Two-sided p of the exact rank-sum test of arms [n], [m]; inf is a value beyond all others (censored).

    Tied values share their mean rank. NaN without values on a side.
    """
    from scipy.stats import rankdata

    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if not len(ours) or not len(theirs):
        return float("nan")
    ranks = 2 * rankdata(np.concatenate([ours, theirs]))  # twice a mean rank is an integer
    ways = _rank_sums([round(rank) for rank in ranks], len(ours))
    sums = np.array(list(ways))
    counts = np.array(list(ways.values()), dtype=float)
    middle = ranks.sum() * len(ours) / len(ranks)
    as_far = np.abs(sums - middle) >= abs(ranks[: len(ours)].sum() - middle) - 1e-9
    return float(counts[as_far].sum() / comb(len(ranks), len(ours)))


def _rank_sums(ranks: list[int], n: int) -> dict[int, int]:
    """In how many ways `n` of the ranks have each sum."""
    found: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(n)]
    for rank in ranks:
        for taken in range(n, 0, -1):
            for total, ways in found[taken - 1].items():
                found[taken][total + rank] = found[taken].get(total + rank, 0) + ways
    return found[n]


def shift(ours: ArrayLike, theirs: ArrayLike) -> tuple[float, float, float]:
    """Median difference of two arms [n], [m] with its exact 95% interval; NaN bounds where arms are too small.

    Three against five is the least: nothing smaller can reach p < 0.05.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    differences = np.sort((ours[:, None] - theirs).ravel())
    if not len(differences):
        return (float("nan"),) * 3
    ways = _rank_sums(list(range(1, len(ours) + len(theirs) + 1)), len(ours))
    least, whole = min(ways), sum(ways.values())
    outside, left = 0, 0.0  # how many differences at each end the test refuses
    while left + ways.get(least + outside, 0) / whole <= ALPHA / 2:
        left += ways.get(least + outside, 0) / whole
        outside += 1
    middle = float(np.median(differences))
    if not outside:
        return middle, float("nan"), float("nan")
    return middle, float(differences[outside - 1]), float(differences[-outside])


def shares(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of two shares with its 95% interval (Newcombe 1998, from Wilson's intervals of each)."""
    parts = [(float(np.mean(arm)), *wilson(int(np.sum(arm)), len(arm))) for arm in (ours, theirs)]
    (p, p_low, p_high), (q, q_low, q_high) = parts
    below, above = np.hypot(p - p_low, q_high - q), np.hypot(p_high - p, q - q_low)
    return p - q, float(p - q - below), float(p - q + above)


def shares_p(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Two-sided p of Fisher's exact test that two shares are equal."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[sum(arm), len(arm) - sum(arm)] for arm in (ours, theirs)]).pvalue)


def holm(p: ArrayLike) -> NDArray:
    """Adjusted p values [k] for k tests taken together (Holm 1979); NaN is no test and stays."""
    p = np.asarray(p, dtype=float)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    scaled = p[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted
