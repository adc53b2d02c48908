"""Solved 6x6 Sudoku grids, all of them, split by canonical form under relabelling.

A grid's canonical form renames symbols so that its first row reads 1..6. There are 28,200,960
grids in only 39,168 classes, so a random split would leak: the same board with other names. Here
classes are split, at most half of them for training, and a grid is a class with a random
relabelling, which makes grids uniform within a split. Boxes are 2 rows x 3 columns.
"""

from functools import cache
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from loopmdm_model.errors import unknown_name
from loopmdm_model.randomness import row_uniforms, step_generator

SIZE, BOX_ROWS, BOX_COLUMNS = 6, 2, 3
N_CELLS = SIZE * SIZE
N_CLASSES = 39_168
SHARES = {"train": 12_000, "validation": 2_000, "test": N_CLASSES - 14_000}


@cache
def canonical_grids() -> UInt8[np.ndarray, "grid cell"]:
    """All classes as grids with first row 0..5, in lexicographic order: [39168, 36] uint8."""
    rows = np.array(list(permutations(range(SIZE))), dtype=np.uint8)
    by_column = (rows[:, None, :] != rows[None, :, :]).all(-1)
    boxes = np.sort(rows.reshape(-1, SIZE // BOX_COLUMNS, BOX_COLUMNS), axis=-1)
    marks = (1 << boxes.astype(int)).sum(-1)
    by_box = ((marks[:, None, :] & marks[None, :, :]) == 0).all(-1)
    grids = np.zeros((1, 1), dtype=int)
    for row in range(1, SIZE):
        fits = by_column[grids].all(1)
        if row % BOX_ROWS:
            fits &= by_box[grids[:, -1]]
        grid, new = np.nonzero(fits)
        grids = np.column_stack([grids[grid], new])
    assert len(grids) == N_CLASSES
    return rows[grids].reshape(N_CLASSES, N_CELLS)


def canonical(grids: Int[Tensor, "batch cell"]) -> Int[Tensor, "batch cell"]:
    """Canonical form: symbols renamed so that the first row reads 0..5."""
    names = torch.empty(len(grids), SIZE, dtype=torch.long)
    names.scatter_(1, grids[:, :SIZE], torch.arange(SIZE).expand(len(grids), SIZE))
    return names.gather(1, grids)


@cache
def classes(split: Literal["train", "validation", "test"]) -> Int[np.ndarray, " grid"]:
    """Indices into `canonical_grids` of one split; the splits are disjoint and fixed for ever."""
    if split not in SHARES:
        raise unknown_name("split", split, SHARES)
    order = step_generator(0, "data").permutation(N_CLASSES)
    start = {"train": 0, "validation": SHARES["train"], "test": SHARES["train"] + SHARES["validation"]}[split]
    return order[start : start + SHARES[split]]


def relabel(index: Int[np.ndarray, " batch"], seed: int, first_index: int = 0) -> Int[Tensor, "batch 36"]:
    """Grids of the classes `index`, each with a random relabelling; token id = symbol 0..5."""
    names = row_uniforms(seed, "relabel", len(index), SIZE, first_index=first_index).argsort(-1)
    return names.gather(1, torch.from_numpy(canonical_grids()[index]).long())


def sample_grids(split: Literal["train", "validation", "test"], n: int, seed: int = 0) -> Int[Tensor, "n 36"]:
    """`n` solved grids of a split, row by row as token ids; distinct classes while they last."""
    pool = classes(split)
    order = step_generator(seed, "order", 1).permutation(len(pool))
    return relabel(pool[np.resize(order, n)], seed)


def is_valid(grids: Int[Tensor, "batch 36"]) -> Bool[Tensor, " batch"]:
    """Whether every row, column and box of each grid holds every symbol once."""
    boards = grids.view(-1, SIZE, SIZE)
    boxes = boards.view(-1, SIZE // BOX_ROWS, BOX_ROWS, SIZE // BOX_COLUMNS, BOX_COLUMNS)
    boxes = boxes.transpose(2, 3).reshape(-1, SIZE, SIZE)
    units = torch.cat([boards, boards.transpose(1, 2), boxes], dim=1)
    return (units.sort(-1).values == torch.arange(SIZE, device=grids.device)).all(-1).all(-1)
