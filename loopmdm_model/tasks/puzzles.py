"""Sudoku puzzles: solved grids with cells hidden, with one solution only if asked for."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.masking import hide, mask_tokens
from loopmdm.model.randomness import step_generator
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.solver import EMPTY, is_unique
from loopmdm.model.tasks.sudoku import Board

ATTEMPTS = 20
"""Orders of removal tried for one grid before giving up."""


def puzzles(
    board: Board, grids: Int[Tensor, "batch cell"], n_clues: int, unique: bool = False, seed: int = 0
) -> MaskedBatch:
    """Grids with all but `n_clues` cells hidden; the clues are condition.

    Cells are hidden at random, as in training, and a puzzle may have several solutions; with `unique` cells are
    taken away one at a time, in random order, wherever one solution remains. Puzzle i depends on its own grid,
    `seed` and i alone.
    """
    if not 0 <= check_count("n_clues", n_clues, least=0) < board.n_cells:
        raise UsageError(f"n_clues must lie in 0..{board.n_cells - 1} for {board.name}, got {n_clues}")
    if not unique:
        return mask_tokens(grids, board.size, mask_ratio=1 - n_clues / board.n_cells, seed=seed)
    masked = np.stack(
        [_dig(board, grid.tolist(), n_clues, seed, number) for number, grid in enumerate(grids.cpu())]
    )
    return hide(
        Sequences.of(grids, torch.ones_like(grids).bool()), torch.from_numpy(masked).to(grids.device), board.size
    )


def _dig(board: Board, grid: list[int], n_clues: int, seed: int, number: int) -> np.ndarray:
    for attempt in range(ATTEMPTS):
        order = step_generator(seed, "dig", number * ATTEMPTS + attempt).permutation(board.n_cells)
        cells, left = list(grid), board.n_cells
        for cell in order:
            if left == n_clues:
                break
            cells[cell] = EMPTY
            if is_unique(board.box_rows, board.box_columns, cells):
                left -= 1
            else:
                cells[cell] = grid[cell]
        if left == n_clues:
            return np.array(cells) == EMPTY
    raise UsageError(
        f"no {board.name} puzzle with {n_clues} clues and one solution was found in {ATTEMPTS} attempts; "
        "ask for more clues"
    )
