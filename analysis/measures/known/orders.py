"""Does looping help more where the generation order is restricted? An interaction, paired by puzzle.

A puzzle is filled one cell a step with its best symbol (one-shot: all cells at once), in

    confidence        the surest cell first: the free order, the reference
    row-major         left to right and top to bottom       } restricted: the model
    one-shot          all cells at once                     } may not choose
    hardest-first     the least sure cell first             } the easy cells first
    deepest-first     by depth of constraint propagation, descending, cells that need search before all; ties row
                      by row: a hardness that does not depend on the model (shallowest-first is its reverse)

    contrast = [rate(S) - rate(S_least)] in an order  -  the same in the reference

Where the reference has no room left to gain (a rate near 1), the contrast of rates can hardly but be positive:
`log_odds` is the contrast of log-odds, which has no such ceiling. It needs rates between 0 and 1: choose puzzles
that are hard enough for the reference. What "restricted" means in the paper is not known; these
definitions are ours. Any valid completion counts as solved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.known.boards import board_of, puzzles_of
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.orders import Order, StepView, as_order, lowest
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.tasks.propagation import propagate
from loopmdm.model.tasks.sudoku import Board

REFERENCE = "confidence"
RESTRICTED = ("row-major", "one-shot", "hardest-first", "deepest-first")
BY_DEPTH = {"deepest-first": -1, "shallowest-first": 1}


@dataclass(frozen=True, eq=False)
class RankedOrder(Order):
    """Each sequence of a batch in its own order: the lowest `place` [batch, pos] first."""

    place: Float[Tensor, "batch pos"]

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:  # noqa: ARG002
        """The next `quota` of each sequence."""
        assert self.place.shape == view.masked.shape
        return lowest(self.place.to(view.masked.device), view.masked, view.quota)


@dataclass(frozen=True)
class OrderEffects:
    """`rates`: n_loops order solve_rate low high n (Wilson's 95% interval).

    `contrasts`: order reference n_loops least_loops gain gain_se reference_gain contrast standard_error low high
    log_odds log_odds_se n: the difference of gains from the least loops to n_loops, paired by puzzle, with its 95%
    interval (Student's t over puzzles, or over clusters of them); log-odds are NaN where a rate is 0 or 1.
    """

    rates: pd.DataFrame
    contrasts: pd.DataFrame


def order_interaction(
    m: LoopedModel,
    b: MaskedBatch,
    n_loops: Sequence[int] | None = None,
    orders: Sequence[str] = RESTRICTED,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> OrderEffects:
    """Solve rates by loops and order, and how much more looping gains in each order than by confidence.

    `n_loops` are two loop counts or more (default 1 and S_max); `orders` names of `diffusion.orders`,
    "deepest-first" or "shallowest-first".
    """
    counts = sorted(
        {check_count("n_loops", count) for count in ((1, m.cfg.max_loops) if n_loops is None else n_loops)}
    )
    if len(counts) < 2:
        raise UsageError("a gain of looping needs two loop counts or more; give n_loops=(1, S)")
    b = as_batch("order_interaction", b, clusters)
    if not bool(b.masked.any(-1).all()):
        raise UsageError("a puzzle hides no cell: nothing to solve; leave it out")
    asked = [REFERENCE, *(order for order in dict.fromkeys(orders) if order != REFERENCE)]
    solved = {
        (order, count): solved_in_order(m, b, order, count, batch_size).double().numpy()
        for order in asked
        for count in counts
    }
    rates = [
        (count, order, right.mean(), *stats.wilson(int(right.sum()), len(right)), len(right))
        for (order, count), right in solved.items()
    ]
    contrasts = [
        (order, REFERENCE, count, counts[0], *_contrast(solved, order, count, counts[0], b.clusters))
        for order in asked[1:]
        for count in counts[1:]
    ]
    columns = ["order", "reference", "n_loops", "least_loops", "gain", "gain_se", "reference_gain", "contrast",
               "standard_error", "low", "high", "log_odds", "log_odds_se", "n"]  # fmt: skip
    return OrderEffects(
        pd.DataFrame(rates, columns=["n_loops", "order", "solve_rate", "low", "high", "n"]),
        pd.DataFrame(contrasts, columns=columns),
    )


def solved_in_order(
    m: LoopedModel, b: MaskedBatch, order: str, n_loops: int, batch_size: int = 32
) -> Bool[Tensor, " batch"]:
    """Which puzzles are completed validly in an order, one cell a step, always the best symbol."""
    board = board_of(b)
    place = _places(board, b, order) if order in BY_DEPTH else None
    solved = []
    for start, part in b.batches(batch_size):
        span = slice(start, start + len(part))
        chosen: Order = as_order(order, board.n_cells) if place is None else RankedOrder(place[span])
        steps = int(part.masked.sum(-1).max())
        r = sample(
            m, clues=part, steps=steps, n_loops=n_loops, order=chosen, temperature=0.0, first_index=start,
            batch_size=batch_size,
        )  # fmt: skip
        solved.append(board.is_valid(r.tokens).cpu())
    return torch.cat(solved)


def _places(board: Board, b: MaskedBatch, order: str) -> Float[Tensor, "batch cell"]:
    depth: Int[Tensor, "batch cell"] = propagate(board, b.tokens).depth
    deep = torch.where(depth < 0, board.n_cells, depth).double()
    return BY_DEPTH[order] * deep + torch.arange(board.n_cells) / (2 * board.n_cells)


def _contrast(
    solved: dict[tuple[str, int], np.ndarray], order: str, count: int, least: int, clusters: np.ndarray | None
) -> tuple:
    """From `gain` on: what a row of contrasts holds.

    The log-odds are `stats.log_ratio` of right against wrong, whose sums would move the last digits of tables.
    """
    ours, theirs = (solved[name, count] - solved[name, least] for name in (order, REFERENCE))
    gain, gain_se, _ = stats.mean_and_error(ours, clusters)
    contrast, error, n = stats.mean_and_error(ours - theirs, clusters)
    half = error * stats.t95(stats.count_units(int(n), clusters))
    log_odds, influence = 0.0, np.zeros(len(ours))
    for name, number, sign in (
        (order, count, 1), (order, least, -1), (REFERENCE, count, -1), (REFERENCE, least, 1)
    ):  # fmt: skip
        right = solved[name, number]
        spread = right.mean() * (1 - right.mean())
        if not spread > 0:
            log_odds, influence = np.nan, np.full(len(ours), np.nan)
            break
        log_odds += sign * np.log(right.mean() / (1 - right.mean()))
        influence += sign * (right - right.mean()) / spread
    log_odds_se = stats.influence_error(influence, clusters) if np.isfinite(log_odds) else np.nan
    values = gain, gain_se, theirs.mean(), contrast, error, contrast - half, contrast + half, log_odds, log_odds_se
    return (*map(float, values), int(n))


def by_kind(case: Case, n_clues: int = 10, unique: bool = False) -> pd.DataFrame:
    """Rates and contrasts (`kind`) at S = 1 and n_loops, on puzzles with `n_clues` of 36 cells given."""
    found = order_interaction(case.m, puzzles_of(case, n_clues, unique), (1, case.n_loops))
    return pd.concat([found.rates.assign(kind="rate"), found.contrasts.assign(kind="contrast")], ignore_index=True)


MEASURES = (
    Measure("sudoku-orders", "solve rate by loops and generation order, and their interaction", by_kind, "Sudoku"),
)
