"""The model's own gate as a stopping rule, on a stand-in of Ouro."""

import pytest
import torch

from loopmdm.analysis.measures import measure
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.stopping import record_loops, stopping_frontier
from loopmdm.model import ExitGate, StateDelta, UsageError
from loopmdm.model.adapters import hook_model
from loopmdm.model.sequences import Sequences
from loopmdm.model.stopping.rules import parse_rule
from loopmdm.model.tasks.test_sets import TestSet
from tests.loopmdm_model.adapters import standins

MOST = 5


@pytest.fixture
def ouro():
    native = standins.prepared(standins.OuroForCausalLM())
    native.model.early_exit_gate.weight.data *= 3  # sequences differ in how soon they stop
    return hook_model(native, max_loops=MOST)


@pytest.fixture
def tokens():
    return torch.randint(4, 20, (6, 8), generator=torch.Generator().manual_seed(1))


def staying(m, tokens):
    """Published: p_i = sigmoid(g_i) prod over j < i of (1 - sigmoid(g_j)); what loop i leaves is 1 - sum."""
    left, exits = torch.ones(tokens.shape), []
    for state, _ in m.model.states(tokens, MOST):
        gate = torch.sigmoid(m.model.native.model.early_exit_gate(state))[..., 0]
        exits.append(gate * left)
        left = left * (1 - gate)
    return 1 - torch.stack(exits).cumsum(0)


def test_the_criterion_is_what_the_exit_distribution_leaves(ouro, tokens):
    run = ouro.run(tokens, stop=ExitGate(0.0, max_loops=MOST))
    torch.testing.assert_close(run.criterion, staying(ouro, tokens).mean(-1), rtol=0, atol=1e-6)
    assert run.loops_used.tolist() == [MOST] * 6


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_it_stops_at_a_quantile_of_the_exit_distribution(ouro, tokens, quantile):
    run = ouro.run(tokens, stop=ExitGate(1 - quantile, max_loops=MOST))
    left = staying(ouro, tokens).mean(-1)
    expected = [next((i + 1 for i in range(MOST) if left[i, row] < 1 - quantile), MOST) for row in range(6)]
    assert run.loops_used.tolist() == expected
    for row, loops in enumerate(expected):  # who stopped is as the model at that number of loops
        torch.testing.assert_close(run.logits[row], ouro(tokens[row : row + 1], loops)[0], rtol=0, atol=1e-5)


def test_some_stop_early_and_some_late(ouro, tokens):
    used = ouro.run(tokens, stop=ExitGate(0.25, max_loops=MOST)).loops_used
    assert 1 <= int(used.min()) < int(used.max()) <= MOST


def test_by_token_each_stops_by_its_own_gate(ouro, tokens):
    run = ouro.run(tokens, stop=ExitGate(0.4, max_loops=MOST, scope="token"))
    assert torch.equal(run.token_loops == 1, staying(ouro, tokens)[0] < 0.4)


def test_without_a_gate_it_says_so(hooked, clean):
    with pytest.raises(UsageError, match="needs a model with an exit gate of its own; this one has none"):
        hooked.run(clean, stop=ExitGate(max_loops=3))


def test_its_name_on_the_command_line():
    assert parse_rule("exit-gate:0.2", 4) == ExitGate(0.2, max_loops=4)


def test_a_causal_frontier_is_of_next_tokens_and_has_the_gate(ouro, tokens):
    record = record_loops(ouro, tokens)
    assert "exit-gate" in record.rules and all(rule.positions == "all" for rule in record.rules.values())
    for loops in (1, MOST):
        log_probs = ouro(tokens, loops)[:, :-1].log_softmax(-1)
        nats = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)
        torch.testing.assert_close(record.losses[loops - 1].float(), nats, rtol=1e-5, atol=1e-5)
    assert record.noise.eq(0).all() and record.n_masked.eq(7).all()
    online = ouro.run(tokens, stop=ExitGate(0.25, max_loops=MOST)).loops_used
    replayed = ExitGate(0.25, max_loops=MOST).replay(record.criteria["exit-gate"])
    assert torch.equal(online, replayed)
    frame = stopping_frontier(ouro, Sequences.of(tokens), n_thresholds=3)
    assert {"exit-gate", "state-delta", "fixed", "oracle"} <= set(frame["rule"])


def test_the_measure_of_a_causal_model_has_no_bins_of_mask_ratio(ouro, tokens, monkeypatch):
    test = TestSet("own", Sequences.of(tokens.repeat(2, 1)))
    monkeypatch.setattr(Case, "of", lambda *given, options, **how: Case(ouro, test, options))
    monkeypatch.setattr(Case, "validation", property(lambda case: test))
    with pytest.warns(UserWarning, match="no groups of it"):
        frame = measure("stopping-frontier", "ouro", MOST, n=12)
    assert "exit-gate" in set(frame["rule"]) and frame["mask_ratio"].isna().all()


def test_a_causal_frontier_needs_two_tokens(ouro, tokens):
    with pytest.raises(UsageError, match="one token only"):
        record_loops(ouro, tokens[:, :1], [StateDelta(max_loops=2)], 2)
