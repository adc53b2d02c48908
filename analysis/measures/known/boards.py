"""Sudoku boards after every loop: is what is still wrong local or global, and who repairs it?

After loop i every hidden cell is filled with its best symbol, all at once; clues stay. The paper reads its boards
as "early loops locally plausible, globally inconsistent; later loops repair them". Definitions are ours, each able
to say no:

    clue_conflicts    share of (hidden cell, clue) pairs in one unit that hold the same symbol: visible at one look
    guess_conflicts   the same for pairs of hidden cells: takes masked positions that agree with each other.
                      Independent uniform guesses give 1 / size in both
    violated_units    share of the rows, columns and boxes with a hidden cell that hold a symbol twice; also
                      violated_rows, violated_columns, violated_boxes
    conflicting       share of hidden cells in any conflict
    valid             boards without violation, any completion counts; plausible_invalid: no conflict with any
                      clue, and yet not valid; valid_other: valid, but not the grid that was hidden
    wrong             share of hidden cells that differ from the solution; wrong_cells: their number a board;
                      repaired (wrong before, right now) and broken (right before, wrong now): shares of hidden
                      cells, so that wrong(i) = wrong(i-1) - repaired(i) + broken(i). For unique puzzles only
    changed_conflicting, changed_other   share of cells in conflict (not in conflict) after loop i-1 whose symbol
                      loop i changes: repair that looks at the board must change the former more

Averages run over all cells (pairs, units) of all boards, errors over boards.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.tasks.propagation import peers, unique, units
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS, Board

Parts = tuple[Tensor, Tensor]
"""Per board: a sum, and the number of things it runs over."""


def board_of(b: MaskedBatch) -> Board:
    """The size of Sudoku whose boards these are; UsageError unless they are solved grids with cells hidden."""
    if not isinstance(b, MaskedBatch):
        raise UsageError("give boards as a MaskedBatch; make one with loopmdm.model.tasks.puzzles.puzzles")
    sizes = {board.n_cells: board for board in BOARDS.values()}
    if b.tokens.shape[1] not in sizes:
        raise UsageError(
            f"a Sudoku board has {', '.join(map(str, sizes))} cells, got {b.tokens.shape[1]} positions"
        )
    board = sizes[b.tokens.shape[1]]
    if not bool(b.real.all()) or not bool(board.is_valid(b.clean).all()):
        raise UsageError(f"the hidden grids must be valid {board.name} boards without padding")
    return board


@torch.no_grad()
def boards_after_loops(
    m: LoopedModel, b: MaskedBatch, n_loops: int | None = None, batch_size: int = 32
) -> Int[Tensor, "loop batch cell"]:
    """The filled boards after every loop: the best symbol of every hidden cell at once, clues kept."""
    board = board_of(b)
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    if m.cfg.mask_token_id != board.size:
        raise UsageError(f"[MASK] of a {board.name} model is {board.size}, this one's is {m.cfg.mask_token_id}")
    filled = b.clean.cpu().expand(n_loops, -1, -1).clone()
    for start, part in b.batches(batch_size):
        if not bool(part.masked.any()):
            continue
        for loop, (state, context) in enumerate(m.states(part.tokens, n_loops)):
            best = m.readout(state, context, rows=part.masked)[:, : board.size].argmax(-1)
            filled[loop, start : start + len(part)][part.masked.cpu()] = best.cpu()
    return filled


def boards_by_loop(
    m: LoopedModel,
    b: MaskedBatch,
    n_loops: int | None = None,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """What is wrong with the boards after every loop.

    Columns: n_loops loop mask_ratio metric value standard_error n. Metrics: see the module. `n` counts the boards
    that have what is averaged over; metrics against the solution count puzzles with one solution only, and those
    that need a loop before are NaN with n = 0 at loop 0.
    """
    board = board_of(b)
    b = as_batch("boards_by_loop", b, clusters)
    filled, hidden, single = boards_after_loops(m, b, n_loops, batch_size), b.masked.cpu(), unique(board, b.tokens)
    rows = []
    for loop, now in enumerate(filled):
        before = filled[loop - 1] if loop else None
        metrics = violations(board, now, hidden) | _against(board, now, before, b, single)
        metrics |= _changes(board, now, before, hidden)
        for metric, (total, number) in metrics.items():
            count = number.double().numpy()
            values = np.divide(total.double().numpy(), count, out=np.full(len(count), np.nan), where=count > 0)
            mean, error, n = (np.array(np.nan), np.array(np.nan), 0)
            if (count > 0).any():
                mean, error, n = stats.weighted_mean_and_error(values, count, b.clusters)
            rows.append((len(filled), loop, b.mask_ratio, metric, float(mean), float(error), int(n)))
    columns = ["n_loops", "loop", "mask_ratio", "metric", "value", "standard_error", "n"]
    return pd.DataFrame(rows, columns=columns)


def conflicts(
    board: Board, filled: Int[Tensor, "batch cell"], hidden: Bool[Tensor, "batch cell"]
) -> tuple[Bool[Tensor, "batch cell other"], Bool[Tensor, "cell other"]]:
    """Which pairs of cells in one unit hold the same symbol, for hidden cells; and which are in one unit."""
    near = peers(board)
    return (filled[:, :, None] == filled[:, None, :]) & near & hidden[:, :, None], near


def violations(
    board: Board, filled: Int[Tensor, "batch cell"], hidden: Bool[Tensor, "batch cell"]
) -> dict[str, Parts]:
    """Metrics that need no solution: sums and numbers [batch]."""
    same, near = conflicts(board, filled, hidden)
    pairs = near & hidden[:, :, None]
    to_clue, to_guess = ~hidden[:, None, :], hidden[:, None, :]
    member = units(board)
    symbols = torch.nn.functional.one_hot(filled, board.size).float()
    twice = (torch.einsum("uc,bcs->bus", member.float(), symbols) > 1).any(-1)
    open_units = (hidden[:, None, :] & member).any(-1)
    one, valid = torch.ones(len(filled)), board.is_valid(filled)
    plausible = ~(same & to_clue).flatten(1).any(-1)
    metrics = {
        "clue_conflicts": ((same & to_clue).sum((1, 2)), (pairs & to_clue).sum((1, 2))),
        "guess_conflicts": ((same & to_guess).sum((1, 2)), (pairs & to_guess).sum((1, 2))),
        "conflicting": (same.any(-1).sum(-1), hidden.sum(-1)),
        "violated_units": ((twice & open_units).sum(-1), open_units.sum(-1)),
        "valid": (valid, one),
        "plausible_invalid": (plausible & ~valid, one),
    }
    for number, kind in enumerate(("rows", "columns", "boxes")):
        span = slice(number * board.size, (number + 1) * board.size)
        there = open_units[:, span]
        metrics[f"violated_{kind}"] = (twice[:, span] & there).sum(-1), there.sum(-1)
    return metrics


def _against(board: Board, now: Tensor, before: Tensor | None, b: MaskedBatch, single: Tensor) -> dict[str, Parts]:
    """Metrics against the solution, of puzzles that have one only."""
    clean, hidden = b.clean.cpu(), b.masked.cpu()
    wrong, number = (now != clean) & hidden, hidden.sum(-1) * single
    was = wrong if before is None else (before != clean) & hidden
    moved = number if before is not None else torch.zeros_like(number)
    return {
        "wrong": (wrong.sum(-1), number),
        "wrong_cells": (wrong.sum(-1), single),
        "repaired": ((was & ~wrong).sum(-1), moved),
        "broken": ((wrong & ~was).sum(-1), moved),
        "valid_other": (board.is_valid(now) & wrong.any(-1), torch.ones(len(now))),
    }


def _changes(board: Board, now: Tensor, before: Tensor | None, hidden: Tensor) -> dict[str, Parts]:
    """Does a loop change the cells that were in conflict more than the others?"""
    nothing = torch.zeros(len(now))
    if before is None:
        return {"changed_conflicting": (nothing, nothing), "changed_other": (nothing, nothing)}
    in_conflict = conflicts(board, before, hidden)[0].any(-1)
    changed = now != before
    groups = {"changed_conflicting": in_conflict, "changed_other": hidden & ~in_conflict}
    return {name: ((changed & group).sum(-1), group.sum(-1)) for name, group in groups.items()}


def on_puzzles(function: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """A measure (m, b, n_loops) on puzzles with `n_clues` of 36 cells given, scaled to the board's size."""

    def run(case: Case, n_clues: int = 20, unique: bool = True) -> pd.DataFrame:
        return function(case.m, puzzles_of(case, n_clues, unique), case.n_loops)

    return run


def puzzles_of(case: Case, n_clues: int, unique: bool) -> MaskedBatch:
    """Its test grids with `n_clues` of 36 cells given, with one solution only if `unique`."""
    board = BOARDS[case.test.task]
    return puzzles(board, case.tokens, round(n_clues / 36 * board.n_cells), unique, case.seed)


MEASURES = (
    Measure(
        "sudoku-boards", "what is wrong with the boards after every loop", on_puzzles(boards_by_loop), "Sudoku"
    ),
)
