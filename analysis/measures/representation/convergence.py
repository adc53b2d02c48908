"""Does the state converge, or only grow? Log-log slopes against their nulls.

A constant drift H(i) = H(-1) + (i + 1) d has steps of constant size, and a relative change that falls as 1/i only
because the state grows. Over a window of loops, per sequence and token group, the slopes of

    log relative_change  against log(i + 1)   null -1: no faster than a constant drift
    log step_norm        against log(i + 1)   null -1: steps that fall as 1/i do not add up to a finite path

are fitted; the state "converges" if both fall faster, "drifts" if the relative change falls no faster than its
null and the steps do not shrink, and is "undecided" otherwise, by 95% intervals over sequences and a margin. (1/i
steps pass the first test, as the state grows like log i: hence the second. A slow contraction seen for too few
loops is undecided: run further.) The window is the later half of the loops before a sequence's relative change is
lost in rounding. "drifts" means that the state keeps moving, on a line or around. Definitions are ours.
"""

from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.representation.fixed_points import FLOOR
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.groups import TOKEN_GROUPS
from loopmdm.analysis.watch.states import check_loops, group_mean, token_groups, trajectory
from loopmdm.model.errors import UsageError, check_number
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.stopping.rules import relative_change

Verdict = Literal["converges", "drifts", "undecided"]
METRICS = ("relative_change", "step_norm")
NULL, LEAST_POINTS = -1.0, 3
COLUMNS = [
    "n_loops", "token_group", "mask_ratio", "metric", "null", "value", "standard_error", "low", "high", "verdict",
    "n", "n_still",
]  # fmt: skip


def window(relative: NDArray) -> tuple[int, int]:
    """First loop and end of one sequence's window; empty if rounding leaves too few loops.

    `relative` [loop] is its relative change.
    """
    below = np.flatnonzero(relative < FLOOR)
    end = int(below[0]) if len(below) else len(relative)
    start = min(end // 2, end - LEAST_POINTS)
    return (start, end) if start >= 0 else (0, 0)


def slopes(relative: NDArray, values: NDArray) -> NDArray:
    """Log-log slopes [batch] of `values` [batch, loop] within each sequence's window; NaN without one."""
    found = np.full(len(values), np.nan)
    for row, (change, value) in enumerate(zip(relative, values, strict=True)):
        start, end = window(change)
        known = np.isfinite(change[start:end]).all() and np.isfinite(value[start:end]).all()
        if end > start and known and (value[start:end] > 0).all():
            x = np.log(np.arange(start, end) + 1.0)
            x = x - x.mean()
            found[row] = (x @ np.log(value[start:end])) / (x @ x)
    return found


def verdict(relative: tuple[float, float], steps: tuple[float, float], margin: float = 0.25) -> Verdict:
    """From the intervals (low, high) of the two slopes; NaN bounds decide nothing."""
    if relative[1] < NULL - margin and steps[1] < NULL - margin:
        return "converges"
    if relative[0] > NULL - margin and steps[0] > -margin:
        return "drifts"
    return "undecided"


def _changes(m: HookedLoopMDM, b: MaskedBatch, n_loops: int) -> Tensor:
    """Per-sequence means [group, metric, batch, loop]."""
    groups = token_groups(m, b)
    out = torch.empty(len(TOKEN_GROUPS), len(METRICS), len(b), n_loops, dtype=torch.float64)
    previous = None
    for loop, state, _ in trajectory(m, b, n_loops):
        if previous is not None:
            values = (relative_change(state, previous), (state - previous).norm(dim=-1))
            for g, group in enumerate(TOKEN_GROUPS):
                out[g, :, :, loop] = torch.stack([group_mean(value, groups[group]) for value in values])
        previous = state
    return out


def _interval(values: NDArray, clusters: np.ndarray | None) -> tuple[float, float, float, float, int]:
    """Mean, standard error, 95% interval by Student's t over sequences or clusters, n."""
    mean, error, n = (number.item() for number in stats.mean_and_error(values, clusters))
    known = np.isfinite(values)
    units = n if clusters is None else len(np.unique(np.asarray(clusters)[known]))
    half = stats.t95(units) * error
    return mean, error, mean - half, mean + half, n


@torch.no_grad()
def convergence(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int = 64,
    margin: float = 0.25,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Slopes and verdict by token group; run far beyond S_max, as a slow contraction needs it.

    Columns: n_loops token_group mask_ratio metric null value standard_error low high verdict n n_still. `value` is
    the mean slope, `low` and `high` its 95% interval; the verdict is that of both slopes together. `n_still`
    counts the sequences that moved too little for a slope: they vote for nothing.
    """
    b, n_loops = as_batch("convergence", b, clusters), check_loops(m, n_loops)
    check_number("margin", margin, 0, 1)
    if margin == 1:
        raise UsageError("margin must be below 1, got 1; give a slope such as 0.25")
    parts = [part for _, _, part in b.each(batch_size, lambda part: _changes(m, part, n_loops))]
    changes = torch.cat(parts, dim=2).double().numpy()
    rows = []
    for group, (relative, steps) in zip(TOKEN_GROUPS, changes, strict=True):
        found = [slopes(relative, values) for values in (relative, steps)]
        spans = [_interval(values, b.clusters) for values in found]
        told = verdict(spans[0][2:4], spans[1][2:4], margin)
        present = np.isfinite(relative).all(-1)
        still = int((present & np.isnan(found[0])).sum())
        for metric, (mean, error, low, high, n) in zip(METRICS, spans, strict=True):
            key = (n_loops, group, b.mask_ratio, metric, NULL)
            rows.append((*key, mean, error, low, high, told, n, still))
    return pd.DataFrame(rows, columns=COLUMNS)


def far_out(case: Case, b: MaskedBatch, least_loops: int = 64) -> pd.DataFrame:
    """At `least_loops` loops or more."""
    return convergence(case.m, b, max(least_loops, case.n_loops), clusters=case.clusters)


MEASURES = (
    Measure(
        "convergence",
        "does the change fall faster than a drift's 1/i",
        far_out,
        groupless=far_out,
        shards=True,
    ),
)
