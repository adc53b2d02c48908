"""The planted model does what it says, exactly: it is what other methods are checked against."""

import pytest
import torch

from loopmdm.model.errors import UsageError
from loopmdm.model.planted import CANDIDATE_LOGIT, HEADS, KNOWN_LOGIT, UNITS, naked_singles
from loopmdm.model.tasks.propagation import candidates_by_round, propagate, units
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS

CLUES = {"sudoku4": 6, "sudoku6": 16, "sudoku9": 40}


@pytest.fixture(scope="module", params=list(CLUES))
def planted(request):
    board = BOARDS[request.param]
    b = puzzles(board, board.sample_grids("test", 20), CLUES[board.name], unique=board.size < 9)
    return board, b, naked_singles(board)


def test_a_loop_is_a_round_of_naked_singles(planted):
    board, b, m = planted
    rounds = candidates_by_round(board, b.tokens, 9, hidden_singles=False)
    found = propagate(board, b.tokens, hidden_singles=False)
    assert found.depth.max() >= 3
    for loop, (state, context) in enumerate(m.states(b.tokens, 9)):
        known = ((found.depth >= 0) & (found.depth <= loop + 1))[..., None]
        wanted = rounds[loop] * CANDIDATE_LOGIT
        wanted = torch.where(
            known, torch.nn.functional.one_hot(found.symbols.clamp(min=0), board.size) * KNOWN_LOGIT, wanted
        )
        # the candidate that a loop fills keeps its mark until the next one
        just = ((found.depth == loop + 1)[..., None]) & rounds[loop]
        wanted = wanted + just * CANDIDATE_LOGIT
        torch.testing.assert_close(m.readout(state, context)[..., :-1], wanted, atol=2e-5, rtol=0)


def test_heads_attend_within_their_unit(planted):
    board, b, m = planted
    _, cache = m.run_with_cache(b.tokens, n_loops=2)
    member = units(board).view(3, board.size, board.n_cells).float()
    for number, head in enumerate(HEADS):
        same = member[number].T @ member[number] / board.size if head in UNITS else torch.eye(board.n_cells)
        for loop in range(2):
            pattern = cache["pattern", "loop", loop, 0][:, number]
            torch.testing.assert_close(pattern, same.expand_as(pattern), atol=2e-5, rtol=0)


def test_the_stream_holds_what_its_channels_are_called(planted):
    board, b, m = planted
    _, cache = m.run_with_cache(b.tokens, n_loops=1)
    taken = cache["resid_mid", "loop", 0, 0][..., m.model.channels["taken"]]
    clues = torch.nn.functional.one_hot(b.tokens, board.size + 1)[..., :-1].float()
    wanted = torch.einsum("uc,ud,bdv->bcv", units(board).float(), units(board).float(), clues)
    torch.testing.assert_close(taken, wanted, atol=1e-5, rtol=0)


def test_candidates_shrink_and_keep_the_solution():
    board = BOARDS["sudoku6"]
    b = puzzles(board, board.sample_grids("test", 20), 14, unique=True)
    rounds = candidates_by_round(board, b.tokens, 8)
    found = propagate(board, b.tokens)
    assert (rounds[1:] <= rounds[:-1]).all() and (rounds[1:] < rounds[:-1]).any()
    assert rounds.gather(-1, b.clean.expand(9, -1, -1)[..., None]).all()
    for number, now in enumerate(rounds):
        filled = (found.depth >= 0) & (found.depth <= number)
        assert (now.sum(-1)[filled] == 1).all()
    open_cells = b.masked
    torch.testing.assert_close(rounds[0].sum(-1)[open_cells], found.candidates[open_cells])
    with pytest.raises(UsageError, match="n_rounds"):
        candidates_by_round(board, b.tokens, -1)
