"""N-gram references are distributions, and solving is judged by the rules."""

import numpy as np
import pytest
import torch

from loopmdm.model.corpora import own_files
from loopmdm.model.errors import UsageError
from loopmdm.model.tasks import test_sets
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


def test_own_texts_are_prepared_once_and_refused_where_they_are_others(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"the cat sat on mat number {number} " * 9)
    name, opened, prepare = f"files:{tmp_path}/*.txt", [], own_files.prepare
    tokenizer = own_files.make_tokenizer(name, 264)
    record = {"spec": {"data": {"corpus": name}}, "corpus_sha256": prepare(name, tokenizer).fingerprint}
    monkeypatch.setattr(own_files, "prepare", lambda *given: opened.append(given) or prepare(*given))
    found = test_sets.test_set_of(record, 16, tokenizer)
    assert len(opened) == 1 and found.clusters.max() == 0
    assert (found.task, found.label) == (name, "files:*.txt")  # tables are passed on
    assert torch.equal(found.tokens, test_sets.load_test_set(name, 16, tokenizer).tokens)
    with pytest.raises(UsageError, match=r"trained by a version before 0\.2\.0; restore it, train again"):
        test_sets.test_set_of(record | {"corpus_sha256": "another"}, 16, tokenizer)


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
