"""Grids are valid and split without leaks; puzzles have the solutions that OR-Tools finds."""

import hashlib
from itertools import islice

import numpy as np
import pytest
import torch
from ortools.sat.python import cp_model

from loopmdm.model.errors import UsageError
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.solver import EMPTY, completions, is_unique
from loopmdm.model.tasks.sudoku import BOARDS, SPLITS, _bases, signature, split_of

SIZES = pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))


@pytest.mark.parametrize(("name", "n_grids"), [("sudoku4", 288), ("sudoku6", 28_200_960)])
def test_all_classes_are_there_valid_and_distinct(name, n_grids):
    board = BOARDS[name]
    grids = board.all_classes()
    assert len(grids) * np.prod(range(1, board.size + 1)) == n_grids
    assert len({grid.tobytes() for grid in grids}) == len(grids)
    assert board.is_valid(torch.from_numpy(grids).long()).all()
    assert (grids[:, : board.size] == np.arange(board.size)).all()


@SIZES
def test_splits_share_no_class(board):
    pools = {split: {grid.tobytes() for grid in board.pool(split)} for split in SPLITS}
    assert {split: len(pool) for split, pool in pools.items()} == board.classes
    assert len(set().union(*pools.values())) == sum(board.classes.values())
    assert len(pools["train"]) <= 2 * len(pools["validation"] | pools["test"])
    test = board.canonical(board.sample_grids("test", 50, seed=1))
    assert {grid.to(torch.uint8).numpy().tobytes() for grid in test} <= pools["test"]


@SIZES
def test_grids_are_valid_and_relabelling_keeps_the_canonical_form(board):
    grids = board.sample_grids("test", 50, seed=2)
    assert board.is_valid(grids).all()
    names = torch.from_numpy(np.random.default_rng(0).permutation(board.size))
    assert torch.equal(board.canonical(names[grids]), board.canonical(grids))
    one = board.relabel(board.pool("train")[[3, 1]], seed=5, first_index=7)
    assert torch.equal(one[1:], board.relabel(board.pool("train")[[1]], seed=5, first_index=8))


def test_the_grids_that_models_were_trained_on_stay_what_they_are():
    grids = BOARDS["sudoku6"].sample_grids("test", 1000)
    digest = hashlib.sha256(grids.numpy().tobytes()).hexdigest()
    assert digest.startswith("30b318553bd245bd")


def test_a_nine_by_nine_split_survives_every_symmetry():
    generator = np.random.default_rng(0)
    for split, grids in _bases().items():
        for grid in grids[:20]:
            bands = [3 * band + generator.permutation(3) for band in generator.permutation(3)]
            image = generator.permutation(9)[grid[np.concatenate(bands)]].T
            assert signature(image) == signature(grid) and split_of(image) == split
    signatures = {signature(grid) for grids in _bases().values() for grid in grids[:50]}
    assert len(signatures) > 140  # it tells unrelated grids apart


@pytest.mark.parametrize("unit", ["row", "column", "box"])
def test_validity_sees_each_kind_of_unit(unit):
    # Swapping two cells breaks the units that do not hold both of them.
    board = BOARDS["sudoku6"]
    grid = board.sample_grids("test", 1)[0].view(6, 6)
    pair = {"row": ((0, 0), (2, 0)), "column": ((0, 0), (0, 4)), "box": ((0, 0), (0, 4))}[unit]
    broken = grid.clone()
    broken[pair[0]], broken[pair[1]] = grid[pair[1]], grid[pair[0]]
    assert not board.is_valid(broken.view(1, 36)).any()


class Counter(cp_model.CpSolverSolutionCallback):
    def __init__(self):
        super().__init__()
        self.count = 0

    def on_solution_callback(self):
        self.count += 1


def count_by_constraints(board, cells, limit=3):
    """Number of completions, by OR-Tools, up to `limit`."""
    model, n = cp_model.CpModel(), board.size
    x = [[model.new_int_var(0, n - 1, f"{r}{c}") for c in range(n)] for r in range(n)]
    for line in range(n):
        model.add_all_different(x[line])
        model.add_all_different([row[line] for row in x])
    for top in range(0, n, board.box_rows):
        for left in range(0, n, board.box_columns):
            model.add_all_different(
                [x[top + r][left + c] for r in range(board.box_rows) for c in range(board.box_columns)]
            )
    for cell, symbol in enumerate(cells):
        if symbol != EMPTY:
            model.add(x[cell // n][cell % n] == symbol)
    solver, counter = cp_model.CpSolver(), Counter()
    solver.parameters.enumerate_all_solutions = True
    solver.parameters.num_workers = 1
    solver.solve(model, counter)
    return min(counter.count, limit)


@SIZES
def test_completions_are_those_that_or_tools_counts(board):
    clues = {4: 5, 6: 14, 9: 34}[board.size]
    grids = board.sample_grids("test", 12, seed=3)
    b = puzzles(board, grids, clues, seed=1)
    counts = []
    for tokens in b.tokens.tolist():
        cells = [EMPTY if token == board.size else token for token in tokens]
        found = list(islice(completions(board.box_rows, board.box_columns, cells), 3))
        assert board.is_valid(torch.tensor(found)).all() and len(set(map(tuple, found))) == len(found)
        assert all(mine in (EMPTY, symbol) for row in found for mine, symbol in zip(cells, row, strict=True))
        counts.append(len(found))
        assert counts[-1] == count_by_constraints(board, cells)
    assert 1 in counts and max(counts) > 1  # both kinds were compared


@SIZES
def test_unique_puzzles_have_one_solution_by_or_tools_too(board):
    clues = {4: 6, 6: 12, 9: 30}[board.size]
    grids = board.sample_grids("test", 4, seed=4)
    b = puzzles(board, grids, clues, unique=True, seed=2)
    assert b.masked.sum(-1).tolist() == [board.n_cells - clues] * 4
    for tokens in b.tokens.tolist():
        cells = [EMPTY if token == board.size else token for token in tokens]
        assert count_by_constraints(board, cells) == 1
    again = puzzles(board, grids, clues, unique=True, seed=2)
    assert torch.equal(again.masked, b.masked)
    assert not torch.equal(puzzles(board, grids, clues, unique=True, seed=3).masked, b.masked)


def test_contradictory_boards_have_no_completion():
    assert not list(completions(2, 2, [0, 0] + [EMPTY] * 14))
    assert len(list(completions(2, 2, [EMPTY] * 16))) == 288
    assert not is_unique(2, 2, [EMPTY] * 16)


def test_impossible_clue_counts_are_refused():
    board = BOARDS["sudoku4"]
    grids = board.sample_grids("test", 1)
    with pytest.raises(UsageError, match="ask for more clues"):
        puzzles(board, grids, 3, unique=True)
    with pytest.raises(UsageError, match=r"0\.\.15"):
        puzzles(board, grids, 16)
