"""Pushes: none changes nothing, a known symbol written into a planted cell takes it from its peers alone."""

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.mechanism.steering import (
    DIRECTIONS,
    answers,
    pushes,
    steer,
    steering,
    symbol_directions,
)
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.planted import CANDIDATE_LOGIT, KNOWN_LOGIT, naked_singles
from loopmdm.model.tasks.propagation import candidates_by_round, propagate, units
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives, standins

SIX = BOARDS["sudoku6"]
MEMBER = units(SIX).float()
PEERS = (MEMBER.T @ MEMBER > 0) & ~torch.eye(36, dtype=torch.bool)


@pytest.fixture(scope="module")
def boards():
    return puzzles(SIX, SIX.sample_grids("test", 24), 16, unique=True)


@pytest.fixture(scope="module")
def planted():
    return naked_singles(SIX)


def logits_after(m, b, n_loops):
    return [m.readout(*at)[..., :6] for at in m.states(b.tokens, n_loops)]


# --- the planted mechanism ---


@pytest.mark.parametrize("loop", [-1, 0, 1])
def test_a_known_symbol_takes_it_from_all_peers_in_the_next_loop_and_from_nobody_else(planted, boards, loop):
    p = pushes(boards, "open", 3)
    b = p.batch
    known = torch.zeros(len(b.tokens), planted.cfg.d_model)
    known[torch.arange(len(known)), planted.model.channels["known"].start + p.symbol] = 1.0
    intact = logits_after(planted, b, loop + 2)
    with steer(planted, known, loop, p.rows):
        pushed = logits_after(planted, b, loop + 2)
    for before in range(loop):
        assert torch.equal(intact[before], pushed[before])
    left = candidates_by_round(SIX, b.tokens, loop + 1, hidden_singles=False)[loop + 1]
    depth = propagate(SIX, b.tokens, hidden_singles=False).depth
    filled = (depth >= 0) & (depth <= loop + 1)  # known before the loop: no candidates are asked there any more
    change = pushed[loop + 1] - intact[loop + 1]
    reached = 0
    for row, (cell, symbol) in enumerate(zip(p.cell.tolist(), p.symbol.tolist(), strict=True)):
        assert change[row, cell, symbol] >= KNOWN_LOGIT - CANDIDATE_LOGIT - 1e-4 or filled[row, cell]
        for other in range(36):
            if other == cell or filled[row, other]:
                continue
            had = bool(left[row, other, symbol])
            single = int(left[row, other].sum()) - (had and bool(PEERS[cell, other])) <= 1
            wanted = torch.zeros(6)
            if PEERS[cell, other] and had:
                wanted[symbol], reached = -CANDIDATE_LOGIT, reached + 1
                if single:  # the last one left is filled in the same loop
                    rest = left[row, other].clone()
                    rest[symbol] = False
                    wanted += rest * KNOWN_LOGIT
                    if int(left[row, other].sum()) == 1:
                        continue  # the push takes the cell's own last candidate
            torch.testing.assert_close(change[row, other], wanted, atol=1e-4, rtol=0)
    assert reached > len(b.tokens)


def test_nothing_but_the_peers_of_a_peer_hears_of_it_later(planted, boards):
    """One loop is one step: what shares no unit with the cell is untouched after one loop, not after several."""
    p = pushes(boards, "open", 3)
    known = torch.zeros(len(p.batch.tokens), planted.cfg.d_model)
    known[torch.arange(len(known)), planted.model.channels["known"].start + p.symbol] = 1.0
    far = ~PEERS[p.cell] & ~p.rows
    intact = logits_after(planted, p.batch, 3)
    with steer(planted, known, 0, p.rows):
        pushed = logits_after(planted, p.batch, 3)
    moved = [(after - before).abs().amax(-1) for before, after in zip(intact, pushed, strict=True)]
    assert moved[1][far].max() < 1e-4 < 1 < moved[2][far].max()


# --- identities ---


def test_strength_0_changes_no_bit_and_a_sum_of_pushes_is_their_sum(boards):
    m, b = HookedLoopMDM(toy_model(d_vocab=7, n_ctx=36)), boards.rows(slice(0, 4))
    d = torch.randn(16, generator=torch.Generator().manual_seed(0))
    intact = m.run(b.tokens, 3).logits
    for loops in (None, 1, -1, [-1, 0, 2], slice(1, None)):
        with steer(m, d, loops, b.masked, 0.0):
            assert torch.equal(m.run(b.tokens, 3).logits, intact)
    with steer(m, d, 1, b.masked, 2.0), steer(m, d, 1, b.masked, 1.0):
        twice = m.run(b.tokens, 3).logits
    with steer(m, d, 1, b.masked, 3.0):
        torch.testing.assert_close(m.run(b.tokens, 3).logits, twice, atol=1e-4, rtol=1e-4)
    assert not torch.equal(twice, intact) and torch.equal(m.run(b.tokens, 3).logits, intact)


def test_the_push_is_added_to_the_state_that_is_named(boards):
    m, b = HookedLoopMDM(toy_model(d_vocab=7, n_ctx=36)), boards.rows(slice(0, 3))
    d = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    plain = [state for state, _ in m.states(b.tokens, 3)]
    with steer(m, d, 1, b.masked, 0.5):
        states = [state for state, _ in m.states(b.tokens, 3)]
    assert torch.equal(states[0], plain[0])
    torch.testing.assert_close(states[1], plain[1] + 0.5 * d[:, None] * b.masked[..., None])
    assert not torch.allclose(states[2], plain[2])
    _, cache = m.run_with_cache(b.tokens, 1, names_filter="loop.0.hook_in")
    with steer(m, d, -1, None, 2.0):
        (first,) = [state for state, _ in m.states(b.tokens, 1)]
    _, context = next(m.states(b.tokens, 1))
    torch.testing.assert_close(first, m.loop(cache["loop.0.hook_in"] + 2 * d[:, None], context, 0))


def test_random_pushes_are_felt_by_nobody_in_an_untrained_model(boards):
    m = HookedLoopMDM(toy_model(d_vocab=7, n_ctx=36))
    found = symbol_directions(m, boards, 2, ("means",))
    frame = steering(m, boards, found, strengths=(1.0,))
    felt = frame[frame["metric"] == "felt"]
    beyond = frame[frame["metric"] == "beyond"].set_index(["direction", "loop"])["value"]
    of = felt.set_index(["direction", "loop"])["value"]
    for loop in (-1, 0, 1):
        assert beyond["random", loop] == 0
        assert beyond["means", loop] == pytest.approx(of["means", loop] - of["random", loop], abs=1e-9)
    # 6 intervals of 95%: two misses or more have a chance of 3%
    assert (felt["low"].gt(0) | felt["high"].lt(0)).sum() <= 2 and felt["value"].abs().max() < 0.1
    np.testing.assert_allclose(
        felt["value"],
        frame[frame["metric"] == "others"]["value"].to_numpy()
        - frame[frame["metric"] == "peers"]["value"].to_numpy(),
    )


# --- who is pushed, and where to ---


@pytest.mark.parametrize("kind", ["open", "excluded"])
def test_pushes_are_of_their_kind(boards, kind):
    p = pushes(boards, kind, 0)
    may = candidates_by_round(SIX, p.batch.tokens, 0)[0]
    for row, (cell, symbol) in enumerate(zip(p.cell.tolist(), p.symbol.tolist(), strict=True)):
        assert p.batch.masked[row, cell] and int(p.batch.clean[row, cell]) != symbol
        assert bool(may[row, cell, symbol]) == (kind == "open")
        readable = p.batch.masked[row] & may[row, :, symbol] & (torch.arange(36) != cell)
        assert torch.equal(p.peers[row], readable & PEERS[cell]) and torch.equal(
            p.others[row], readable & ~PEERS[cell]
        )
        assert bool(p.peers[row].any()) and bool(p.others[row].any())
    assert torch.equal(p.cell, pushes(boards, kind, 0).cell) and not torch.equal(
        p.cell, pushes(boards, kind, 1).cell
    )


def test_directions_are_of_length_one_and_follow_their_symbol(planted, boards):
    found = symbol_directions(planted, boards, 3)
    assert {name for name, _ in found.vectors} == set(DIRECTIONS) - {"random"}
    for vectors in found.vectors.values():
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
    known = planted.model.channels["known"]
    means = found.vectors["means", 2][:, known]
    assert torch.equal(means.argmax(1), torch.arange(6))
    read = found.vectors["unembedding", 0]
    wanted = torch.eye(6) - 1 / 6
    wanted = torch.cat([KNOWN_LOGIT * wanted, CANDIDATE_LOGIT * wanted], 1)
    ours = torch.cat([read[:, known], read[:, planted.model.channels["candidates"]]], 1)
    torch.testing.assert_close(ours, wanted / wanted.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


def test_the_planted_models_peers_feel_the_measures_push(planted, boards):
    found = symbol_directions(planted, boards, 3, ("unembedding",))
    frame = steering(planted, boards, found, strengths=(2.0,)).set_index(["metric", "direction", "loop"])
    for loop in (-1, 0, 1):
        felt = frame.loc["felt", "unembedding", loop]
        assert felt["low"] > 0 and felt["value"] > frame.loc["felt", "random", loop]["value"]
    assert frame.loc["peers", "unembedding", 2]["value"] == 0  # no loop is left, and nothing stands after
    assert frame.loc["follows", "unembedding", 2]["value"] > 0.8


def test_answers_are_the_read_outs_probabilities(planted, boards):
    p = answers(planted, boards, 2, 6)
    assert torch.equal(p.sum(-1) > 0, boards.masked)
    torch.testing.assert_close(p[boards.masked].sum(-1), torch.ones(int(boards.masked.sum())))


# --- other models, refusals ---


@pytest.mark.parametrize("name", ["Bert", "Llama", "shifted"])
def test_any_model_is_steered_in_any_direction(name):
    if name == "shifted":
        m = hook_model(standins.prepared(standins.DreamModel()), loop=(1, 1), max_loops=2)
    else:
        how = {"mask_token_id": 103} if name == "Bert" else {}
        m = hook_model(natives.native(name), loop=(1, 2), max_loops=2, **how)
    tokens = torch.randint(4, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    rows = torch.zeros(2, 8, dtype=torch.bool)
    rows[:, 5] = True
    intact = m.run(tokens, 2).logits
    with steer(m, torch.ones(m.cfg.d_model), 0, rows, 0.0):
        assert torch.equal(m.run(tokens, 2).logits, intact)
    with steer(m, torch.ones(m.cfg.d_model).cumsum(0), 0, rows, 1.0):
        moved = (m.run(tokens, 2).logits != intact).any(-1)
    if m.facts.causal:
        assert not moved[:, :5].any()  # what stands before does not see it
    assert moved[:, 5].any() or moved[:, 6].any()


def test_misuse_is_named(planted, boards):
    d, b = torch.zeros(planted.cfg.d_model), boards
    with pytest.raises(UsageError, match=r"a direction is \[d_model\] or .* got \[3\]"), steer(planted, d[:3]):
        pass
    with pytest.raises(UsageError, match="a direction is"), steer(planted, "known"):  # pyright: ignore
        pass
    with pytest.raises(UsageError, match="the direction is not finite"), steer(planted, d + float("nan")):
        pass
    with (
        pytest.raises(UsageError, match="strength must be a finite number"),
        steer(planted, d, strength=float("nan")),
    ):
        pass
    with (
        pytest.raises(UsageError, match="give a direction and rows of as many sequences"),
        steer(planted, d + 1, 0, b.masked[:2]),
    ):
        planted.run(b.tokens, 1)
    with pytest.raises(UsageError, match='kind must be "open" or "excluded"'):
        pushes(b, "wrong")
    one = torch.nn.functional.one_hot(b.masked.int().argmax(-1), 36).bool()
    with pytest.raises(UsageError, match="no board has a cell to push to a symbol that is open; hide more cells"):
        pushes(type(b)(torch.where(one, b.tokens, b.clean), b.clean, one), "open")
    with pytest.raises(UsageError, match='direction must be "means", "probe", "unembedding" or "random"'):
        symbol_directions(planted, b, 1, ("sae",))
    with pytest.raises(UsageError, match="each symbol must be hidden somewhere"):
        symbol_directions(planted, type(b)(torch.where(one, b.tokens, b.clean), b.clean, one).rows(slice(0, 1)), 1)
    with pytest.raises(UsageError, match="strengths are numbers in spreads"):
        steering(planted, b, symbol_directions(planted, b, 1, ("means",)), strengths=("much",))
    with pytest.raises(UsageError, match="steering needs a model of sudoku"):
        measure("steering", "sotu-loop")
