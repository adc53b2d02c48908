"""Propagation derives what the search solver finds, no sooner and no later than a naive one."""

from itertools import islice

import numpy as np
import pytest
import torch

from loopmdm.model.errors import UsageError
from loopmdm.model.tasks.propagation import propagate, unique, units
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.solver import EMPTY, completions, is_unique
from loopmdm.model.tasks.sudoku import BOARDS

SIZES = pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))
FEW = {4: 4, 6: 11, 9: 28}


def naive(board, cells, hidden_singles=True):
    """Rounds cell by cell with sets; depth of each cell."""
    n = board.size
    place = lambda c: (c // n, c % n, (c // n // board.box_rows, c % n // board.box_columns))  # noqa: E731
    peers = [
        [[d for d in range(n * n) if d != c and place(c)[kind] == place(d)[kind]] for kind in range(3)]
        for c in range(n * n)
    ]
    grid = {c: s for c, s in enumerate(cells) if 0 <= s < n}
    depth = [0 if c in grid else EMPTY for c in range(n * n)]
    for step in range(1, n * n + 1):
        options = {
            c: {s for s in range(n) if all(grid.get(d) != s for unit in peers[c] for d in unit)}
            for c in range(n * n)
            if c not in grid
        }
        new = {}
        for c, mine in options.items():
            if len(mine) == 1:
                new[c] = next(iter(mine))
            for s in mine if hidden_singles else ():
                if any(all(s not in options.get(d, set()) for d in unit) for unit in peers[c]):
                    new[c] = s
        if not new:
            break
        grid |= new
        for c in new:
            depth[c] = step
    return depth, [grid.get(c, EMPTY) for c in range(n * n)]


@SIZES
@pytest.mark.parametrize("hidden_singles", [True, False])
def test_depths_are_those_of_the_naive_twin(board, hidden_singles):
    grids = board.sample_grids("test", 12 // board.size, seed=1)
    for clues in (FEW[board.size], board.n_cells // 2):
        b = puzzles(board, grids, clues, seed=3)
        reached = propagate(board, b.tokens, hidden_singles)
        for row, tokens in enumerate(b.tokens.tolist()):
            depth, symbols = naive(board, tokens, hidden_singles)
            assert reached.depth[row].tolist() == depth
            assert reached.symbols[row].tolist() == symbols


@SIZES
def test_what_is_derived_is_right_in_every_completion(board):
    grids = board.sample_grids("test", 6, seed=2)
    some_left = False
    for b in (puzzles(board, grids, FEW[board.size] + 2, True, 1), puzzles(board, grids, board.n_cells // 2)):
        reached = propagate(board, b.tokens)
        derived = reached.depth > 0
        assert torch.equal(reached.symbols[derived], b.clean[derived])
        assert torch.equal(reached.depth == 0, ~b.masked)
        assert torch.equal(reached.symbols == EMPTY, reached.depth == EMPTY)
        assert board.is_valid(reached.symbols[reached.solved]).all()
        some_left |= not bool(reached.solved.all())
        cells = b.tokens.masked_fill(b.masked, EMPTY)
        for row, start in enumerate(cells.tolist()):
            for whole in islice(completions(board.box_rows, board.box_columns, start), 4):
                assert torch.equal(torch.tensor(whole)[derived[row]], reached.symbols[row][derived[row]])
    assert some_left or board.size == 4


@SIZES
def test_uniqueness_is_that_of_the_search(board):
    grids = board.sample_grids("test", 8, seed=5)
    b = puzzles(board, grids, {4: 5, 6: 14, 9: 34}[board.size], seed=1)
    cells = b.tokens.masked_fill(b.masked, EMPTY)
    expected = [is_unique(board.box_rows, board.box_columns, row) for row in cells.tolist()]
    assert unique(board, b.tokens).tolist() == expected == unique(board, cells).tolist()
    assert len(set(expected)) == 2


def test_hand_made_depths():
    # One row misses one cell: naked, round 1. Two cells wait for each other's round.
    board = BOARDS["sudoku4"]
    grid = torch.tensor([[0, 1, 2, 3, 2, 3, 0, 1, 1, 0, 3, 2, 3, 2, 1, 0]])
    assert board.is_valid(grid).all()
    cells = grid.clone()
    cells[0, 5] = 4
    reached = propagate(board, cells)
    assert reached.depth[0].tolist() == [1 if cell == 5 else 0 for cell in range(16)]
    assert reached.candidates[0].tolist() == [1 if cell == 5 else 0 for cell in range(16)]
    # 0 . . . / . . . . / . . . . / . . . .: no rule applies anywhere.
    alone = torch.full((1, 16), EMPTY)
    alone[0, 0] = 0
    assert propagate(board, alone).depth[0].tolist() == [0] + [EMPTY] * 15
    # Clues 0 at cells 0, 6 and 13: in the last box the rows and columns leave one place for 0, cell 11.
    three = torch.full((1, 16), EMPTY)
    three[0, [0, 6, 13]] = 0
    by_both, by_naked = propagate(board, three), propagate(board, three, hidden_singles=False)
    assert by_both.depth[0, 11] == 1 and by_both.symbols[0, 11] == 0
    assert by_naked.depth[0, 11] == EMPTY


def test_an_empty_board_and_a_full_one():
    board = BOARDS["sudoku6"]
    nothing = propagate(board, torch.full((2, 36), 6))
    assert (nothing.depth == EMPTY).all() and not nothing.solved.any() and (nothing.candidates == 6).all()
    full = propagate(board, board.sample_grids("test", 3))
    assert (full.depth == 0).all() and full.solved.all() and (full.candidates == 0).all()


def test_units_are_rows_columns_and_boxes():
    member = units(BOARDS["sudoku6"])
    assert member.shape == (18, 36) and (member.sum(0) == 3).all() and (member.sum(1) == 6).all()
    assert member[0].nonzero()[:, 0].tolist() == list(range(6))
    assert member[7].nonzero()[:, 0].tolist() == list(range(1, 36, 6))
    assert member[13].nonzero()[:, 0].tolist() == [3, 4, 5, 9, 10, 11]


def test_relabelling_the_symbols_changes_no_depth():
    board = BOARDS["sudoku6"]
    b = puzzles(board, board.sample_grids("test", 10), 12)
    names = torch.from_numpy(np.append(np.random.default_rng(0).permutation(6), 6))
    assert torch.equal(propagate(board, b.tokens).depth, propagate(board, names[b.tokens]).depth)


IMPOSSIBLE = {
    # Row 0 has 0 twice; everything else still has its places.
    "twice": ("sudoku9", {0: 0, 4: 0}),
    # Row 0 cannot hold 0: its first box, cell 3, column 4 and column 5 are taken.
    "no place": ("sudoku6", {6: 0, 3: 1, 16: 0, 29: 0}),
    # Cell 0 sees 0..2 in its row, 3..5 in its column, 6..8 in its box.
    "no candidate": ("sudoku9", {3: 0, 4: 1, 5: 2, 27: 3, 36: 4, 45: 5, 1: 6, 2: 7, 9: 8}),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_boards_without_completion_are_refused(kind):
    name, clues = IMPOSSIBLE[kind]
    board = BOARDS[name]
    cells = torch.full((2, board.n_cells), EMPTY)
    for cell, symbol in clues.items():
        cells[1, cell] = symbol
    with pytest.raises(UsageError, match="board 1 has no completion"):
        propagate(board, cells)


def test_cells_that_are_none_are_refused():
    board = BOARDS["sudoku4"]
    with pytest.raises(UsageError, match=r"\[batch, 16\] cells"):
        propagate(board, torch.zeros(1, 36, dtype=torch.long))
    with pytest.raises(UsageError, match=r"0\.\.3"):
        propagate(board, torch.full((1, 16), 5))
