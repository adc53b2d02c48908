"""Sum-product against the enumeration of all states."""

import itertools

import numpy as np
import pytest
import torch

from loopmdm.model.tasks.trees import TREE_TASKS, TreeModel, binary_tree

SMALL = [
    TreeModel(binary_tree(3), 2, 0.8),
    TreeModel((-1, 0, 1, 2, 3), 3, 0.7),
    TreeModel((-1, 0, 0, 0, 2), 3, 0.9),
]


def enumerated(model: TreeModel, tokens, masked) -> np.ndarray:
    total = np.zeros((model.n_nodes, model.n_states))
    for states in itertools.product(range(model.n_states), repeat=model.n_nodes):
        if any(not hidden and states[i] != tokens[i] for i, hidden in enumerate(masked)):
            continue
        chance = 1 / model.n_states
        for node, parent in enumerate(model.parents[1:], start=1):
            chance *= model.transition[states[parent], states[node]]
        for node, state in enumerate(states):
            total[node, state] += chance
    return total / total.sum(-1, keepdims=True)


@pytest.mark.parametrize("model", SMALL)
def test_posterior_is_the_enumerated_one(model):
    tokens = model.sample(20, seed=1)
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    exact = model.posterior(tokens, masked)
    for row in range(20):
        np.testing.assert_allclose(
            exact[row], enumerated(model, tokens[row].tolist(), masked[row].tolist()), atol=1e-12
        )


def test_samples_follow_the_transitions():
    model = TREE_TASKS["tree"]
    tokens = model.sample(4000, seed=0)
    same = (tokens[:, 1:] == tokens[:, list(model.parents[1:])]).double().mean()
    assert float(same) == pytest.approx(0.85, abs=0.005)
    share = torch.bincount(tokens.flatten(), minlength=4).double() / tokens.numel()
    torch.testing.assert_close(share, torch.full((4,), 0.25).double(), atol=0.02, rtol=0)
    away = tokens[:, 1][tokens[:, 1] != tokens[:, 0]]
    assert len(away.unique()) == 4
    assert torch.equal(model.sample(3, 0, first_index=5), model.sample(8, 0)[5:])


def rounds(model: TreeModel, tokens, masked, n: int) -> np.ndarray:
    """Beliefs after n rounds of parallel message passing."""
    k, count = model.n_states, model.n_nodes
    edges = [(p, c) for c, p in enumerate(model.parents) if p >= 0] + [
        (c, p) for c, p in enumerate(model.parents) if p >= 0
    ]
    evidence = [np.ones(k) if masked[i] else np.eye(k)[tokens[i]] for i in range(count)]
    messages = {edge: np.ones(k) / k for edge in edges}
    for _ in range(n):
        new = {}
        for source, target in edges:
            product = evidence[source].copy()
            for other, to in edges:
                if to == source and other != target:
                    product = product * messages[other, to]
            out = model.transition @ product
            new[source, target] = out / out.sum()
        messages = new
    beliefs = []
    for node in range(count):
        belief = evidence[node].copy()
        for source, target in edges:
            if target == node:
                belief = belief * messages[source, target]
        beliefs.append(belief / belief.sum())
    return np.array(beliefs)


@pytest.mark.parametrize("model", SMALL)
def test_hops_are_the_rounds_that_belief_propagation_needs(model):
    tokens = model.sample(12, seed=2)
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    exact, hops = model.posterior(tokens, masked).numpy(), model.hops(masked).numpy()
    needed = np.zeros_like(hops)
    for row in range(12):
        for n in range(model.n_nodes + 1):
            wrong = (
                np.abs(rounds(model, tokens[row].tolist(), masked[row].tolist(), n) - exact[row]).max(-1) > 1e-9
            )
            needed[row, wrong] = n + 1
    assert (needed <= hops).all()  # never more
    assert (needed == hops).mean() > 0.95  # fewer only where opposite evidence happens to cancel


def test_chains_need_only_their_nearest_clean_neighbours():
    model = TREE_TASKS["markov"]
    tokens = model.sample(1, seed=4)
    masked = torch.zeros(1, 32, dtype=torch.bool)
    masked[0, 10:14] = True
    changed = tokens.clone()
    changed[0, :9] = (changed[0, :9] + 1) % 6
    changed[0, 15:] = (changed[0, 15:] + 1) % 6
    one, two = model.posterior(tokens, masked), model.posterior(changed, masked)
    torch.testing.assert_close(one[0, 10:14], two[0, 10:14])
    assert model.hops(masked)[0, 9:15].tolist() == [0, 4, 3, 3, 4, 0]
