"""Similarity of the representations of any two loops: debiased linear CKA.

    CKA(a, b) = HSIC(a, b) / sqrt(HSIC(a, a) HSIC(b, b))

with the unbiased estimator of Song et al. 2012 (as in Nguyen et al. 2021): for Gram matrices K, L with zeroed
diagonals, HSIC = [tr KL + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)] / (n (n-3)). For linear kernels every term
is a function of the sums in `moments.py`, used here instead of the n x n matrices:

    tr KL = ||X'Y||^2 - sum |x|^2 |y|^2,   1'K1 = |sum x|^2 - sum |x|^2,
    1'KL1 = sum_i (x_i . sum x - |x_i|^2) (y_i . sum y - |y_i|^2)

1 for equal features up to rotation and scale, about 0 for independent ones, also where n < d_model (plain CKA is
near 1 there); an unbiased estimate can leave 0..1. Positions of a sequence are not independent, which
unbiasedness assumes: unit "sequence" compares sequences' mean states. Only the choice of groups is ours.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.measures.representation.moments import (
    LoopMoments,
    Unit,
    check_chosen,
    check_unit,
    group_states,
)
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.groups import TOKEN_GROUPS
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch

COLUMNS = [
    "n_loops", "loop", "other_loop", "token_group", "mask_ratio", "unit", "metric", "value", "standard_error", "n",
    "n_samples",
]  # fmt: skip


def hsic(s: LoopMoments, a: int, b: int) -> float:
    """The unbiased estimate for loops a <= b of the sums; NaN below four samples."""
    n = s.n
    if n < 4:
        return float("nan")
    cross, x, y = s.cross[a][b - a], s.total[a], s.total[b]
    trace = cross.pow(2).sum() - s.squares_cross[a, b]
    sums = (x @ x - s.squares[a]) * (y @ y - s.squares[b])
    both = x @ cross @ y - x @ s.skew[a, b] - y @ s.skew[b, a] + s.squares_cross[a, b]
    return float((trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * both) / (n * (n - 3)))


def cka(s: LoopMoments) -> tuple[Float[np.ndarray, "loop loop"], Float[np.ndarray, "loop loop"]]:
    """Debiased CKA and HSIC of all pairs; CKA is NaN where a loop's own HSIC is not positive."""
    size = len(s.total)
    dependence = np.full((size, size), np.nan)
    for a in range(size):
        for b in range(a, size):
            dependence[a, b] = dependence[b, a] = hsic(s, a, b)
    own = np.diag(dependence)
    own = np.where(own > 0, own, np.nan)
    return dependence / np.sqrt(np.outer(own, own)), dependence


class _Influence:
    """Second pass: first-order influence of each sequence on all CKA values (the delta method).

    A sample moves HSIC by 2 (x' Cov(x, y) y - mean of that), less its own share of the covariance.
    """

    def __init__(self, s: LoopMoments, n_sequences: int):
        size = len(s.total)
        self.s, self.mean = s, s.mean()
        self.pairs = [(a, b) for a in range(size) for b in range(a, size)]
        self.sums = torch.zeros(n_sequences, len(self.pairs), dtype=torch.float64)
        self.counts = torch.zeros(n_sequences, dtype=torch.float64)
        self.covariances = [s.covariance(a, b) for a, b in self.pairs]

    def add(self, x: Tensor, owner: Tensor) -> None:
        x = x - self.mean
        norms = x.pow(2).sum(-1)
        self.counts.index_add_(0, owner, torch.ones(len(owner), dtype=torch.float64))
        for column, ((a, b), covariance) in enumerate(zip(self.pairs, self.covariances, strict=True)):
            moved = ((x[a] @ covariance) * x[b]).sum(-1) - norms[a] * norms[b] / self.s.n
            self.sums[:, column].index_add_(0, owner, moved)

    def errors(self, value: np.ndarray, dependence: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
        """Standard errors [loop, loop]."""
        n, size = self.s.n, len(value)
        moved = 2 * (self.sums - self.counts[:, None] * self.sums.sum(0) / n) / n  # [sequence, pair]
        by_pair = dict(zip(self.pairs, moved.numpy().T, strict=True))
        result = np.full((size, size), np.nan)
        absent = self.counts.numpy() == 0
        n_sequences = int((~absent).sum())
        for a, b in self.pairs:
            if np.isnan(value[a, b]):
                continue
            own = np.sqrt(dependence[a, a] * dependence[b, b])
            shrink = by_pair[a, a] / dependence[a, a] + by_pair[b, b] / dependence[b, b]
            influence = (by_pair[a, b] / own - value[a, b] / 2 * shrink) * n_sequences
            result[a, b] = result[b, a] = stats.influence_error(np.where(absent, np.nan, influence), clusters)
        return result


@torch.no_grad()
def loop_similarity(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    loops: Sequence[int] | None = None,
    unit: Unit = "position",
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Debiased linear CKA of all ordered pairs of `loops` (default -1, the prelude's output, to n_loops - 1).

    Columns: n_loops loop other_loop token_group mask_ratio unit metric ("cka") value standard_error n (sequences)
    n_samples. NaN below four samples. Errors are first-order, from a second pass over the data (over sequences,
    or `clusters` of them); they are too small where the truth is exactly 0. See `moments.py` for the memory.
    """
    b, n_loops = as_batch("loop_similarity", b, clusters), check_loops(m, n_loops)
    check_unit(unit)
    chosen = check_chosen(loops, n_loops)
    sums = {group: LoopMoments(len(chosen), m.cfg.d_model) for group in TOKEN_GROUPS}
    for group, x, _ in group_states(m, b, chosen, unit, batch_size):
        sums[group].add(x)
    second = {group: _Influence(s, len(b)) for group, s in sums.items() if s.n >= 4}
    for group, x, owner in group_states(m, b, chosen, unit, batch_size):
        if group in second:
            second[group].add(x, owner)
    rows = []
    for group, s in sums.items():
        value, dependence = cka(s)
        error, n = np.full_like(value, np.nan), 0
        if group in second:
            error = second[group].errors(value, dependence, b.clusters)
            n = int((second[group].counts > 0).sum())
        for (i, j), cell in np.ndenumerate(value):
            known = 0 if np.isnan(cell) else n
            key = (n_loops, chosen[i], chosen[j], group, b.mask_ratio, unit, "cka")
            rows.append((*key, float(cell), float(error[i, j]), known, s.n))
    return pd.DataFrame(rows, columns=COLUMNS)


MEASURES = (
    Measure(
        "similarity", "debiased linear CKA between loops", plain(loop_similarity), groupless=plain(loop_similarity)
    ),
)
