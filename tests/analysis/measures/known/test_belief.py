"""Belief propagation: its rounds are the posterior of what they reach, and planted propagators are recovered."""

import itertools

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.known import belief_rounds, beliefs, best_rounds
from loopmdm.analysis.measures.quality.likelihoods import excess_kl
from loopmdm.model.diffusion.likelihood import masked_draw
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import Sequences
from loopmdm.model.tasks.test_sets import TestSet
from loopmdm.model.tasks.trees import TREE_TASKS, TreeModel, binary_tree
from tests.conftest import toy_config, toy_model

SMALL = [
    TreeModel(binary_tree(3), 2, 0.8),
    TreeModel((-1, 0, 1, 2, 3), 3, 0.7),
    TreeModel((-1, 0, 0, 0, 2), 3, 0.9),
]


def distances(task):
    """Number of edges between any two nodes."""
    reach = np.full((task.n_nodes, task.n_nodes), task.n_nodes)
    np.fill_diagonal(reach, 0)
    for child, parent in enumerate(task.parents):
        if parent >= 0:
            reach[child, parent] = reach[parent, child] = 1
    for middle in range(task.n_nodes):
        reach = np.minimum(reach, reach[:, [middle]] + reach[[middle]])
    return reach


def enumerated(task, tokens, masked):
    """Posterior of every node by running through all states."""
    total = np.zeros((task.n_nodes, task.n_states))
    for states in itertools.product(range(task.n_states), repeat=task.n_nodes):
        if any(not hidden and states[i] != tokens[i] for i, hidden in enumerate(masked)):
            continue
        chance = 1.0
        for node, parent in enumerate(task.parents[1:], start=1):
            chance *= task.transition[states[parent], states[node]]
        total[np.arange(task.n_nodes), list(states)] += chance
    return total / total.sum(-1, keepdims=True)


@pytest.mark.parametrize("task", SMALL)
def test_a_belief_is_the_posterior_of_what_lies_within_its_rounds(task):
    tokens = task.sample(4, seed=1)
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    far = distances(task)
    for step, belief in enumerate(beliefs(task, tokens, masked, task.n_nodes)):
        for row, node in itertools.product(range(4), range(task.n_nodes)):
            known = ~masked[row].numpy() & (far[node] <= step)
            expected = enumerated(task, tokens[row].tolist(), ~known)[node]
            np.testing.assert_allclose(belief[row, node], expected, atol=1e-12)


def passed(task, tokens, masked, n):
    """Beliefs after n rounds of parallel message passing, message by message."""
    edges = [(p, c) for c, p in enumerate(task.parents) if p >= 0]
    edges += [(c, p) for p, c in edges]
    evidence = [np.ones(task.n_states) if masked[i] else np.eye(task.n_states)[t] for i, t in enumerate(tokens)]
    messages = {edge: np.ones(task.n_states) for edge in edges}

    def heard(node, but):
        parts = [messages[s, t] for s, t in edges if t == node and s != but]
        return np.prod([evidence[node], *parts], axis=0)

    for _ in range(n):
        messages = {(s, t): (out := task.transition @ heard(s, t)) / out.sum() for s, t in edges}
    return np.array([heard(node, None) / heard(node, None).sum() for node in range(task.n_nodes)])


@pytest.mark.parametrize("name", ["tree", "markov"])
def test_beliefs_reach_the_posterior_after_their_hops(name):
    task = TREE_TASKS[name]
    tokens = task.sample(6, seed=3)
    b = mask_tokens(tokens, task.n_states, mask_ratio=0.8, maskable=task.maskable)
    exact, hops = task.posterior(tokens, b.masked), task.hops(b.masked)
    most, off = int(hops.max()), []
    for step, belief in enumerate(beliefs(task, tokens, b.masked, most)):
        done = hops <= step
        torch.testing.assert_close(belief[done], exact[done], atol=1e-10, rtol=0)
        off.append(float((belief - exact).abs().max()))
        if step < 4:
            np.testing.assert_allclose(belief[0], passed(task, tokens[0].tolist(), b.masked[0], step), atol=1e-10)
    assert most > 3 and off[0] > 0.1 and off[-1] < 1e-10


class Propagator:
    """After loop i it answers with the belief after offset + pace * i rounds."""

    def __init__(self, task, pace, offset=1):
        self.task, self.pace, self.offset = task, pace, offset
        self.cfg = toy_config(d_vocab=task.n_states + 1, n_ctx=task.n_nodes)

    def states(self, tokens, n_loops, attention_mask=None):
        for loop in range(n_loops):
            yield loop, tokens

    def readout(self, loop, tokens, *, rows):
        masked = tokens == self.cfg.mask_token_id
        *_, belief = beliefs(self.task, tokens, masked, self.offset + self.pace * loop)
        log = belief[rows].log()
        return torch.cat([log, torch.full((len(log), 1), float("-inf"))], dim=1)


@pytest.fixture(scope="module")
def tree_batch():
    task = TREE_TASKS["tree"]
    return mask_tokens(task.sample(30, seed=0), 4, mask_ratio=1.0, maskable=task.maskable)


@pytest.mark.parametrize(("pace", "offset"), [(1, 1), (2, 1), (0, 0), (1, 3)])
def test_the_pace_of_a_propagator_is_found(tree_batch, pace, offset):
    task = TREE_TASKS["tree"]
    frame = best_rounds(Propagator(task, pace, offset), tree_batch, "tree", n_loops=3)
    assert frame["best_round"].tolist() == [offset + pace * loop for loop in range(3)]
    np.testing.assert_allclose(frame["kl"], 0, atol=1e-9)
    assert (frame["gap"] > 3 * frame["gap_se"]).all() and (frame["share"] > 0.9).all() and (frame["n"] == 30).all()


def test_the_matrix_ends_in_the_excess_over_the_exact_posterior():
    task = TREE_TASKS["tree"]
    model = toy_model(d_vocab=5, n_ctx=63)
    tokens = task.sample(12, seed=1)
    sequences = Sequences.of(tokens, task.maskable)
    b = masked_draw(sequences, 4, 0, 0)
    frame = belief_rounds(model, b, task, n_loops=2, least_hops=0, batch_size=5)
    case = Case(model, TestSet("tree", sequences))
    excess = excess_kl(case, [1, 2], 1)
    excess["total"] = excess["excess_kl"] * excess["n_nodes"]
    by_loop = excess.groupby("n_loops")[["total", "n_nodes"]].sum()
    last = frame[frame["round"] == frame["round"].max()].set_index("loop")
    np.testing.assert_allclose(last["kl"], by_loop["total"] / by_loop["n_nodes"], rtol=1e-6)
    assert (last["n_nodes"] == by_loop["n_nodes"].to_numpy()).all()
    assert (frame[["kl", "kl_reverse"]] >= 0).all(axis=None)


def test_divergences_by_hand(tree_batch):
    task = TREE_TASKS["tree"]
    frame = belief_rounds(Propagator(task, 0, 0), tree_batch, task, n_loops=1, n_rounds=2, least_hops=3)
    chosen = (task.hops(tree_batch.masked) >= 3) & tree_batch.masked
    *_, belief = beliefs(task, tree_batch.tokens.clamp(max=3), tree_batch.masked, 2)
    p = belief[chosen].numpy()
    row = frame[frame["round"] == 2].iloc[0]  # the model answers with 1/4 throughout
    assert row["kl"] == pytest.approx((p * np.log(p / 0.25)).sum(-1).mean())
    assert row["kl_reverse"] == pytest.approx((0.25 * np.log(0.25 / p)).sum(-1).mean())
    assert row["n_nodes"] == int(chosen.sum())


def test_batches_and_clusters_of_belief(tree_batch):
    m = toy_model(d_vocab=5, n_ctx=63)
    one, many = (belief_rounds(m, tree_batch, "tree", n_loops=2, batch_size=size) for size in (64, 7))
    np.testing.assert_allclose(one, many, rtol=1e-4)
    assert (one["n"] == 30).all() and (one["standard_error"] > 0).all()
    pairs = np.arange(30) // 2
    assert not np.allclose(belief_rounds(m, tree_batch, "tree", 2, clusters=pairs)["standard_error"],
                           one["standard_error"], rtol=1e-3)  # fmt: skip


def test_nodes_that_nobody_is_as_deep_as_give_nan(tree_batch):
    model = toy_model(d_vocab=5, n_ctx=63)
    frame = belief_rounds(model, tree_batch, "tree", n_loops=1, least_hops=40)
    assert frame["kl"].isna().all() and (frame["n"] == 0).all() and (frame["n_nodes"] == 0).all()
    best = best_rounds(model, tree_batch, "tree", n_loops=1, least_hops=40)
    assert best["best_round"].isna().all() and (best["n"] == 0).all()


def test_other_tasks_are_refused(tree_batch, batch, hooked):
    model = toy_model(d_vocab=5, n_ctx=63)
    with pytest.raises(UsageError, match="did you mean tree"):
        belief_rounds(model, tree_batch, "trees")
    with pytest.raises(UsageError, match="32 positions"):
        belief_rounds(model, tree_batch, "markov")
    with pytest.raises(UsageError, match="vocabulary of 3"):
        belief_rounds(toy_model(d_vocab=3, n_ctx=63), tree_batch, "tree")


# --- orders ---
