"""Edges: identities, then the planted mechanism, then a null, other people's models, and what is refused."""

import dataclasses

import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.interventions.selections import relation_of
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.mechanism.corruption import corrupted
from loopmdm.analysis.measures.mechanism.edge_attribution import edge_attribution
from loopmdm.analysis.measures.mechanism.edge_effects import (
    edge_effects,
    edge_strength,
    relation_test,
    relay_effects,
)
from loopmdm.analysis.measures.mechanism.edge_groups import edge_groups
from loopmdm.analysis.measures.mechanism.edge_paths import Hop, along_path, path_patching
from loopmdm.analysis.measures.mechanism.edges import (
    EdgeStudy,
    Messages,
    edge_patching,
    read_edges,
    record_messages,
)
from loopmdm.analysis.measures.relations import relations
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.planted import HEADS, naked_singles
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import candidates_by_round, propagate
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_config, toy_model
from tests.loopmdm_model.adapters import natives, standins

BOARD = BOARDS["sudoku6"]


def everything(b: MaskedBatch) -> torch.Tensor:
    return torch.ones(*b.tokens.shape, b.tokens.shape[1], dtype=torch.bool)


def nothing(b: MaskedBatch) -> torch.Tensor:
    return ~everything(b)


@pytest.fixture
def study(hooked, batch) -> EdgeStudy:
    return EdgeStudy.of(hooked, batch, corrupted(hooked, batch, how="resample").tokens, 3)


# --- identities ---


def test_a_runs_own_messages_change_nothing_bit_for_bit(study):
    m = study.m
    with read_edges(m, [(everything(study.batch), study.clean.messages)]):
        assert torch.equal(study.onward(study.clean.states[0], 0), study.logits)
    for edges in (nothing(study.batch), everything(study.batch)):
        same = dataclasses.replace(study, corrupt=study.clean)
        lost = same.lost(same.patched(edges, [0, 2]))
        assert all(torch.equal(values, torch.zeros_like(values)) for values in lost.values())


def test_all_edges_of_all_loops_and_the_first_state_are_the_corrupted_run(study):
    m, other = study.m, study.corrupt
    expected = m.readout(other.states[-1], other.context, rows=study.asked.rows)
    with read_edges(m, [(everything(study.batch), other.messages)]):
        found = study.onward(other.states[0], 0)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert float((expected - study.logits)[:, :-1].abs().max()) > 0.1


def test_one_loop_of_messages_is_all_that_others_say_in_it():
    """Without a prelude only the changed place enters otherwise, so the rest hears all of it through edges."""
    m = HookedLoopMDM(toy_model(n_prelude_layers=0, n_loop_layers=1))
    b = mask_tokens(torch.randint(0, 22, (4, 10), generator=torch.Generator().manual_seed(1)), 22, mask_ratio=0.5)
    other = corrupted(m, b, seed=3).tokens
    study = EdgeStudy.of(m, b, other, 1)
    with read_edges(m, [(everything(b), study.corrupt.messages)], 0):
        heard = m.loop(study.clean.states[0], study.clean.context, 0)
    rest = b.tokens == other
    torch.testing.assert_close(heard[rest], study.corrupt.states[1][rest], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(heard[rest], study.clean.states[1][rest], atol=1e-3)


def test_mixed_scores_by_hand(study):
    """One edge, one head: the softmax over mixed scores and the mixed values, written out."""
    m, edges = study.m, nothing(study.batch)
    edges[:, 2, 5] = True
    place, names = (1, 2), ("rot_q", "rot_k", "v")
    site = [f"loop.1.blocks.2.attn.hook_{name}" for name in (*names, "z")]
    with read_edges(m, [(edges, study.corrupt.messages)], loops=1, heads=0):
        _, cache = m.run_with_cache(study.batch.tokens, n_loops=2, names_filter=site)
    q, k, v, z = (cache[name][0, :, 0] for name in site)
    other_k, other_v = (
        part[place][0, :, 0] for part in (study.corrupt.messages.keys, study.corrupt.messages.values)
    )
    k, v = k.clone(), v.clone()
    k[5], v[5] = other_k[5], other_v[5]
    expected = (q[2] @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v
    torch.testing.assert_close(z[2], expected, atol=1e-5, rtol=1e-5)


def test_attribution_of_a_partition_adds_up(study):
    groups = edge_groups(study.m, study.batch)
    assert torch.equal(torch.stack(list(groups.values())).sum(0), everything(study.batch).long())
    for _, carried in edge_attribution(study):
        parts = [(carried * edges[:, None]).sum((1, 2, 3)) for edges in groups.values()]
        torch.testing.assert_close(torch.stack(parts).sum(0), carried.sum((1, 2, 3)), atol=1e-5, rtol=1e-5)


def test_attribution_is_the_derivative_of_patching():
    m = HookedLoopMDM(toy_model(n_loop_layers=1).double())
    b = mask_tokens(torch.randint(0, 22, (4, 10), generator=torch.Generator().manual_seed(1)), 22, mask_ratio=0.5)
    study, step = EdgeStudy.of(m, b, corrupted(m, b, how="resample").tokens, 3), 1e-5
    near = study.clean.messages.mixed(study.corrupt.messages, step)
    small = dataclasses.replace(study, corrupt=dataclasses.replace(study.corrupt, messages=near))
    chosen = torch.rand(4, 2, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.3
    for loop, carried in edge_attribution(study):
        lost = small.by_sequence(small.lost(small.patched(chosen, [loop])))["difference"] / step
        torch.testing.assert_close((carried * chosen).sum((1, 2, 3)), lost, atol=1e-3, rtol=1e-3)


def test_one_hop_is_edge_patching_and_no_hop_is_nothing():
    m = HookedLoopMDM(toy_model(n_loop_layers=1))
    b = mask_tokens(torch.randint(0, 22, (4, 10), generator=torch.Generator().manual_seed(1)), 22, mask_ratio=0.5)
    other = corrupted(m, b, how="resample").tokens
    edges = everything(b) & ~torch.eye(10, dtype=torch.bool) & b.masked[:, :, None]
    for loop in range(3):
        path = path_patching(m, b, other, [Hop(loop, edges)], 3)
        torch.testing.assert_close(
            path, edge_patching(m, b, other, edges, [loop], n_loops=3), atol=1e-6, rtol=1e-5
        )
    study = EdgeStudy.of(m, b, other, 3)
    silent = along_path(study, [Hop(0, nothing(b)), Hop(2, edges)])
    assert torch.equal(silent, study.logits)  # a sender without an effect
    assert torch.equal(along_path(study, [Hop(0, edges), Hop(1, nothing(b))]), study.logits)
    heard = along_path(study, [Hop(0, edges), Hop(2, edges)])
    assert float((heard - study.logits)[:, :-1].abs().max()) > 1e-3


# --- the planted mechanism ---


@pytest.fixture(scope="module")
def planted():
    """Boards with chains of deductions, one clue changed."""
    m = naked_singles(BOARD)
    b = puzzles(BOARD, BOARD.sample_grids("test", 40), 16, unique=True)
    return m, b, corrupted(m, b, seed=1).tokens


def test_only_edges_of_a_unit_carry_and_each_head_its_own(planted):
    m, b, other = planted
    study = EdgeStudy.of(m, b, other, 4)
    lost = study.lost(study.patched(relations(m, 36)["none"].expand(len(b), -1, -1), range(4)))
    assert all(torch.equal(values, torch.zeros_like(values)) for values in lost.values())
    place = torch.arange(36)
    same = {"row": place // 6, "column": place % 6, "box": place // 6 // 2 * 2 + place % 6 // 3}
    for number, head in enumerate(HEADS[:3]):
        unit = same[head][:, None] == same[head][None]
        inside, outside = (
            study.lost(study.patched(edges.expand(len(b), -1, -1), range(4), number))["kl"]
            for edges in (unit, ~unit)
        )
        assert float(inside.max()) > 0.1 and float(outside.max()) == 0.0, head
    for loop, carried in edge_attribution(study):
        assert not carried[:, :, relation_of(BOARD, "none")].any(), loop


def chains(b: MaskedBatch, other: torch.Tensor):
    """(board, changed clue, relay, receiver) where the rule says that a fill of round 1, changed at the relay
    alone, changes what the receiver may hold after it; and that of the clue does not."""
    first, then = (propagate(BOARD, tokens, hidden_singles=False) for tokens in (b.tokens, other))
    member = (relation_of(BOARD, "none") | torch.eye(36, dtype=torch.bool)).logical_not()
    found = []
    for row, tokens in enumerate(b.tokens):
        clue = int((tokens != other[row]).nonzero()[0, 0])
        filled = torch.where(first.depth[row] == 1, first.symbols[row], tokens)
        before = candidates_by_round(BOARD, filled[None], 0, False)[0, 0]
        for relay in range(36):
            now = int(then.symbols[row, relay]) if then.depth[row, relay] == 1 else 6
            if tokens[relay] != 6 or not member[relay, clue] or now == filled[relay]:
                continue
            told = filled.clone()
            told[relay] = now
            after = _candidates(told)
            hit = (after != before).any(-1) & (filled == 6)
            found += [(row, clue, relay, cell) for cell in hit.nonzero()[:, 0].tolist() if cell != relay]
    return found


def _candidates(cells: torch.Tensor) -> torch.Tensor:
    """What each cell may hold, written out: no check that a completion exists."""
    member = (relation_of(BOARD, "none") | torch.eye(36, dtype=torch.bool)).logical_not()
    held = torch.nn.functional.one_hot(cells, 7)[:, :6].bool()
    return held | ((cells == 6)[:, None] & ~(member.float() @ held.float() > 0))


def open_clue(b: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Two inputs of equal masks: a clue's symbol replaced by one that contradicts no other clue."""
    rows = []
    for row, tokens in enumerate(b.tokens):
        given = (tokens != 6).nonzero()[:, 0].tolist()
        options = []
        for cell in given:
            rest = tokens.clone()
            rest[cell] = 6
            allowed = _candidates(rest)[cell]
            allowed[tokens[cell]] = False
            options += [(cell, symbol) for symbol in allowed.nonzero()[:, 0].tolist()]
        for cell, symbol in options:
            changed_board = tokens.clone()
            changed_board[cell] = symbol
            try:
                propagate(BOARD, changed_board[None], hidden_singles=False)
            except UsageError:
                continue
            rows.append((row, changed_board))
            break
    keep = torch.tensor([row for row, _ in rows])
    return keep, torch.stack([board for _, board in rows])


def test_a_two_hop_path_is_found_where_the_rule_says_and_dies_with_its_relay(planted):
    m, b, _ = planted
    keep, other = open_clue(b)
    b = b.rows(keep)
    expected = chains(b, other)
    far = [chain for chain in expected if relation_of(BOARD, "none")[chain[3], chain[1]]]
    assert len(far) >= 5
    study = EdgeStudy.of(m, b, other, 2)
    row_of = b.masked.nonzero()
    for board, clue, relay in sorted({chain[:3] for chain in far})[:8]:
        first, second = torch.zeros(2, *b.tokens.shape, 36, dtype=torch.bool)
        first[board, relay, clue] = True
        second[board, :, relay] = b.masked[board]
        second[board, relay, relay] = False
        kl = study.lost(along_path(study, [Hop(0, first), Hop(1, second)]))["kl"]
        reached = {(int(r), int(c)) for r, c in row_of[kl > 1e-3]}
        assert reached == {(board, cell) for *chain, cell in expected if tuple(chain) == (board, clue, relay)}
        assert float(kl[row_of[:, 0] != board].max()) == 0.0
    board, clue, relay, cell = far[0]
    at = ((row_of[:, 0] == board) & (row_of[:, 1] == cell)).nonzero()[0, 0]
    sources = torch.zeros(*b.tokens.shape, 36, dtype=torch.bool)
    sources[board, :, clue] = True
    sources[:, range(36), range(36)] = False
    once = EdgeStudy.of(m, b, other, 1)
    assert float(once.lost(once.patched(sources, [0]))["kl"][at]) == 0.0  # not before loop 1
    relays = torch.tensor(sorted({chain[2] for chain in expected if chain[:2] + chain[3:] == (board, clue, cell)}))
    cut_there = torch.zeros_like(sources)
    cut_there[board, cell, relays] = True
    told = study.lost(study.patched(sources, [0]))["kl"][at]
    pairs = [(sources, study.corrupt.messages)]
    with read_edges(m, pairs, 0), read_edges(m, [(cut_there, study.clean.messages)], 1):
        silent = study.lost(study.onward(study.clean.states[0], 0))["kl"][at]
    assert float(told) > 1e-3 and float(silent) < 1e-5


def test_the_tables_say_what_was_planted(planted):
    m, b, _ = planted
    frame = edge_effects(m, b.rows(slice(0, 12)), 3, seed=1)
    exact = frame[frame["method"] == "exact"]
    far = exact[exact["relation"] == "none"]
    assert len(far) and (far["value"] == 0.0).all()
    own = exact[(exact["relation"] == "self") & (exact["metric"] == "kl") & (exact["keys"] == "clean")]
    assert (own[own["loop"] == 0]["value"] < 1e-6).all()  # what a clue counts of itself, it takes away again
    heard = exact[(exact["metric"] == "kl") & (exact["queries"] == "masked") & (exact["loop"] == 0)]
    heard = heard.set_index(["relation", "keys"])["value"]
    assert heard["row", "clean"] > 0.01 and heard["box", "masked"] == 0.0  # in loop 0 only clues know anything
    later = exact[(exact["metric"] == "kl") & (exact["keys"] == "masked") & (exact["loop"] == 1)]
    assert later[later["relation"] == "box"]["value"].max() > 0.0
    relayed = relay_effects(m, b.rows(slice(0, 12)), 3, seed=1)
    told = relayed[relayed["metric"] == "kl"].set_index(["loop", "second", "relay", "relation"])["value"]
    assert told[0, 1, "masked", "any"] > 0.0 and told[0, 1, "masked", "none"] == 0.0
    assert (told[:, :, "clean"] < 1e-9).all()  # a clue hears nothing


def test_rows_of_both_methods_are_of_the_same_sequences(hooked, batch):
    whole = edge_effects(hooked, batch, 2, corruption="resample")
    some = edge_effects(hooked, batch, 2, corruption="resample", n_exact=2, batch_size=1)
    names = ["loop", "relation", "keys", "queries", "metric"]
    study = EdgeStudy.of(hooked, batch, corrupted(hooked, batch, how="resample").tokens, 2)
    edges = edge_groups(hooked, study.batch)
    group = next(group for group in edges if group.relation == "1" and group.keys == group.queries == "masked")
    lost = study.by_sequence(study.lost(study.patched(edges[group], [1])))["kl"]
    has = edges[group].flatten(1).any(-1)
    for frame, keep in ((whole, [0, 1, 2, 3]), (some, [0, 3])):
        row = frame[frame["method"] == "exact"].set_index(names).loc[(1, "1", "masked", "masked", "kl")]
        assert row["n"] == int(has[keep].sum())
        assert row["value"] == pytest.approx(float(lost[keep][has[keep]].mean()), abs=1e-6)
        assert row["per_edge"] == pytest.approx(row["value"] / row["n_edges"])
    everyone = [frame[frame["method"] == "attribution, all"].set_index(names)["value"] for frame in (whole, some)]
    pd.testing.assert_series_equal(*everyone, atol=1e-5, rtol=1e-4)


def test_the_table_of_relays_is_path_patching(hooked, batch):
    frame = relay_effects(hooked, batch, 3, corruption="token", seed=2)
    other = corrupted(hooked, batch, seed=2).tokens
    sources, own = batch.tokens != other, torch.eye(10, dtype=torch.bool)
    first = (batch.masked & ~sources)[:, :, None] & sources[:, None, :]
    second = batch.masked[:, :, None] & (batch.masked & ~sources)[:, None, :] & ~own
    expected = path_patching(hooked, batch, other, [Hop(0, first), Hop(2, second)], 3)
    found = frame.set_index(["loop", "second", "relay", "relation", "metric"])["value"]
    for metric, values in expected.items():
        assert found[0, 2, "masked", "any", metric] == pytest.approx(float(values.mean()), abs=1e-6)


# --- a null ---


def board_model(seed: int) -> HookedLoopMDM:
    """Untrained, of the size of a board, as training starts."""
    torch.manual_seed(seed)
    shape = {"d_vocab": 7, "n_ctx": 36, "initializer_range": 0.02, "n_prelude_layers": 0}
    return HookedLoopMDM(LoopMDM(toy_config(**shape)).eval())


def test_in_untrained_models_the_relation_says_nothing_and_in_the_planted_all(planted):
    m, b, other = planted
    share, p = relation_test(edge_strength(m, b, other, 3), relations(m, 36), n_draws=199)
    assert p == 1 / 200 and share > 0.1
    below = 0
    for seed in range(20):
        toy = board_model(seed)
        _, p = relation_test(edge_strength(toy, b, other, 2), relations(toy, 36), n_draws=99, seed=seed)
        below += p <= 0.1
    assert below <= 6  # of 20 at 10%: more has probability 0.002


# --- other people's models ---


@pytest.mark.parametrize("name", ["Bert", "Qwen3", "Llama", "Dream", "LLaDA"])
def test_on_other_peoples_models(name):
    if name in ("Dream", "LLaDA"):
        kind = {"Dream": standins.DreamModel, "LLaDA": standins.LLaDAModelLM}[name]
        m = hook_model(standins.prepared(kind()), loop=(1, 1), max_loops=2)
    else:
        changes = {"mask_token_id": 103} if name == "Bert" else {}
        m = hook_model(natives.native(name), loop=(1, 2), max_loops=2, **changes)
    tokens = torch.randint(3, 20, (6, 10), generator=torch.Generator().manual_seed(0))
    causal = m.facts.causal
    b = MaskedBatch(tokens, tokens, torch.zeros_like(tokens).bool()) if causal else m.mask(tokens, ratio=0.4)
    told = questions("test", m, b)
    other = corrupted(m, told, how="resample").tokens
    study = EdgeStudy.of(m, b, other, 2)
    expected = m.readout(study.corrupt.states[-1], study.corrupt.context, rows=study.asked.rows)
    with read_edges(m, [(everything(b), study.corrupt.messages)]):
        torch.testing.assert_close(study.onward(study.corrupt.states[0], 0), expected, atol=1e-4, rtol=1e-4)
        moved = study.onward(study.clean.states[0], 0)
    assert float((moved - study.logits).abs().nan_to_num(0).max()) > 1e-3
    frame = edge_effects(m, b, 2, corruption="resample", n_exact=4)
    assert set(frame["relation"]) == {"self", "1", "2-3", "4-7", "8-9"}
    assert set(frame["keys"]) == ({"clean"} if causal else {"masked", "clean"})
    sums = frame[frame["method"] == "attribution, all"].groupby("loop")
    groups = edge_groups(m, study.batch)
    for loop, carried in edge_attribution(study):
        for group, edges in groups.items():
            part = sums.get_group(loop).set_index(["relation", "keys", "queries"])
            row = part.loc[(group.relation, group.keys, group.queries)]
            has = edges.flatten(1).any(-1)
            mean = (carried * edges[:, None]).sum((1, 2, 3))[has].mean()
            assert float(row["value"]) == pytest.approx(float(mean), abs=1e-4)


# --- what is refused ---


def test_what_is_wrong_is_said_in_a_line(hooked, batch, study):
    other = corrupted(hooked, batch, how="resample").tokens
    own = everything(batch)
    shorter = record_messages(hooked, batch.tokens, 1).messages
    with (
        pytest.raises(UsageError, match="no messages of loop 1, layer 1 are there"),
        read_edges(hooked, [(own, shorter)]),
    ):
        hooked(batch.tokens, n_loops=2)
    for call, said in (
        (lambda: corrupted(hooked, batch, how="noise"), 'corruption must be "token" or "resample"'),
        (lambda: EdgeStudy.of(hooked, batch, other[:2]), "must have the shape of the clean ones"),
        (lambda: EdgeStudy.of(hooked, batch, other.roll(1, 1)), "must be masked at the same positions"),
        (lambda: edge_patching(hooked, batch, other, own, [7]), "loops run from 0 to 2, got 7"),
        (lambda: edge_patching(hooked, batch, other, own.float(), [0]), "edges must be boolean"),
        (
            lambda: edge_patching(hooked, batch, other, own[:, :5, :5]),
            r"edges are \[4, 5, 5\]; \[batch, query, key\] is",
        ),
        (lambda: along_path(study, [Hop(1, ~own[:2])]), r"edges are \[2, 10, 10\]"),
        (lambda: Hop(0, own), "a hop leads to another position"),
        (lambda: along_path(study, []), "a path needs hops in rising loops of 0..2, got"),
        (lambda: along_path(study, [Hop(1, ~own), Hop(1, ~own)]), r"rising loops of 0..2, got \[1, 1\]"),
        (lambda: relay_effects(hooked, batch, 1), "a relay needs two loops"),
        (lambda: edge_effects(hooked, batch, by="predicts"), 'leave by="holds"'),
        (lambda: relation_test(torch.ones(3, 3), {"a": torch.eye(3).bool()}), "relations must part all pairs"),
        (lambda: EdgeStudy.of(hooked.model, batch, other), "needs hooks; give HookedLoopMDM"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
    nothing_shown = MaskedBatch(torch.full((2, 4), 22), torch.ones(2, 4).long(), torch.ones(2, 4).bool())
    with pytest.raises(UsageError, match="no sequence has a clean token that can be changed"):
        corrupted(hooked, nothing_shown)


def test_scores_that_are_no_product_are_refused(hooked, batch):
    def add_bias(scores, hook):
        return scores + torch.arange(scores.shape[-1])

    with (
        hooked.hooks([(lambda name: name.endswith("attn_scores"), add_bias)]),
        pytest.raises(UsageError, match="a bias or a cap"),
    ):
        record_messages(hooked, batch.tokens, 2)


def test_messages_mix(study):
    clean, other = study.clean.messages, study.corrupt.messages
    for share, expected in ((0.0, clean), (1.0, other)):
        mixed = clean.mixed(other, share)
        assert isinstance(mixed, Messages)
        torch.testing.assert_close(mixed.keys[1, 1], expected.keys[1, 1])
