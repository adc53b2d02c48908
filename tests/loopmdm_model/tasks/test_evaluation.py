"""N-gram references are distributions, and solving is judged by the rules."""

import numpy as np
import pytest
import torch

from loopmdm.model.errors import UsageError
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import NGrams, solve_one_shot
from tests.conftest import toy_model


def test_bigram_is_a_distribution_after_seen_and_unseen_tokens():
    unigram = np.array([0.5, 0.3, 0.2])
    model = NGrams(unigram, {(0, 1): 3, (0, 0): 1}, np.array([4, 0, 0]), weight=0.9)
    for left in (0, 1):
        pairs = np.array([[left, right] for right in range(3)])
        nll = 2 * model.bigram_nll(pairs) + np.log(unigram[left])
        np.testing.assert_allclose(np.exp(-nll).sum(), 1)
    np.testing.assert_allclose(model.bigram_nll(np.array([[0, 1]])), -np.log([0.5 * (0.9 * 0.75 + 0.1 * 0.3)]) / 2)
    np.testing.assert_allclose(model.unigram_nll(np.array([[0, 2]])), -np.log([0.1]) / 2)


def test_solving_keeps_clues_and_counts_valid_boards():
    board = BOARDS["sudoku6"]
    grids = board.sample_grids("test", 6)
    b = puzzles(board, grids, 20)
    assert b.masked.sum(-1).tolist() == [16] * 6
    model = toy_model(d_vocab=7, n_ctx=36)
    one_cell = puzzles(board, grids, 35)
    guess = torch.where(one_cell.masked, model(one_cell.tokens, n_loops=1).argmax(-1), one_cell.tokens)
    assert solve_one_shot(model, board, one_cell, 1)[0].tolist() == (guess == grids).all(-1).tolist()


def test_solving_in_small_batches_is_solving_at_once():
    board = BOARDS["sudoku6"]
    b = puzzles(board, board.sample_grids("test", 40), 35)
    model = toy_model(d_vocab=7, n_ctx=36)
    at_once, small = (solve_one_shot(model, board, b, 3, batch_size=size) for size in (40, 7))
    assert [outcome.tolist() for outcome in small] == [outcome.tolist() for outcome in at_once]
    assert len(at_once) == 3 and {value for outcome in at_once for value in outcome.tolist()} == {True, False}
    with pytest.raises(UsageError, match="batch_size"):
        solve_one_shot(model, board, b, 1, batch_size=0)
    with pytest.raises(UsageError, match=r"no boards|non-empty"):
        solve_one_shot(model, board, b.rows(slice(0)), 1)
