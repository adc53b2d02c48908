"""Samplers against the enumerated law of a toy."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from loopmdm.model.diffusion.orders import Ancestral, Blocks, FirstHitting, FixedOrder, Remask
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.protocol import LoopOutput
from tests.conftest import toy_config, toy_model
from tests.textbook import textbook_sample

V, L = 3, 3
MASK = V


def tiny():
    model = toy_model(seed=3, d_vocab=V + 1, n_ctx=4, d_model=8, initializer_range=0.8)
    return model.double()


def conditionals(model) -> dict[tuple, np.ndarray]:
    """p(token | ids) at every position, for all 4^L partly masked sequences."""
    states = list(itertools.product(range(V + 1), repeat=L))
    probabilities = model(torch.tensor(states), n_loops=2).softmax(-1)[..., :V].numpy()
    return dict(zip(states, probabilities, strict=True))


def push(law: dict, moves) -> dict:
    """One step of a Markov chain: `moves(state)` yields (probability, next state)."""
    after: dict = {}
    for state, mass in law.items():
        for chance, following in moves(state):
            after[following] = after.get(following, 0.0) + mass * chance
    return after


def independent(choices_of):
    """Moves whose positions change independently; `choices_of(state, position)` lists (chance, id)."""

    def moves(state):
        options = [choices_of(state, position) for position in range(L)]
        for combination in itertools.product(*options):
            chance = np.prod([c for c, _ in combination])
            if chance > 0:
                yield chance, tuple(token for _, token in combination)

    return moves


def law_of_steps(model, steps: int, eta: float = 0.0, rescale: bool = False) -> dict:
    """Ancestral (eta = 0), capped or rescaled ReMDM."""
    table, law = conditionals(model), {(MASK,) * L: 1.0}
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        most = min(1.0, s / (1 - t)) if t < 1 else 0.0
        sigma = eta * most if rescale else min(eta, most)
        reveal = ((1 - s) - (1 - sigma) * (1 - t)) / t if s > 0 else 1.0

        def choices(state, position, reveal=reveal, sigma=sigma):
            if state[position] != MASK:
                return [(1 - sigma, state[position]), (sigma, MASK)]
            return [(1 - reveal, MASK)] + [(reveal * table[state][position][v], v) for v in range(V)]

        law = push(law, independent(choices))
    return law


def law_of_one_at_a_time(model, place) -> dict:
    """`place(state)` lists (chance, position) of what is filled next."""
    table, law = conditionals(model), {(MASK,) * L: 1.0}
    for _ in range(L):

        def moves(state):
            for chance, position in place(state):
                for v in range(V):
                    following = (*state[:position], v, *state[position + 1 :])
                    yield chance * table[state][position][v], following

        law = push(law, moves)
    return law


def anywhere(state):
    free = [position for position in range(L) if state[position] == MASK]
    return [(1 / len(free), position) for position in free]


def agrees(tokens: torch.Tensor, law: dict) -> float:
    """p-value of a chi-square test; cells with expectation under 5 pooled."""
    assert sum(law.values()) == pytest.approx(1.0)
    n, cells = len(tokens), sorted(law)
    rows, numbers = np.unique(tokens.numpy(), axis=0, return_counts=True)
    seen = {tuple(row): number for row, number in zip(rows.tolist(), numbers.tolist(), strict=True)}
    assert set(seen) <= set(cells)
    expected = np.array([law[cell] * n for cell in cells])
    observed = np.array([seen.get(cell, 0) for cell in cells], dtype=float)
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    return float(chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


EXACT = [
    (Ancestral(), lambda model: law_of_steps(model, 2)),
    (Ancestral(), lambda model: law_of_steps(model, 5)),
    (Remask(eta=0.4), lambda model: law_of_steps(model, 5, eta=0.4)),
    (Remask(eta=0.0), lambda model: law_of_steps(model, 5)),
    (Remask(0.7, "rescale"), lambda model: law_of_steps(model, 5, eta=0.7, rescale=True)),
    (FirstHitting(), lambda model: law_of_one_at_a_time(model, anywhere)),
    (FixedOrder(), lambda model: law_of_one_at_a_time(model, lambda state: [(1.0, state.index(MASK))])),
    (Blocks(1, FirstHitting()), lambda model: law_of_one_at_a_time(model, lambda s: [(1.0, s.index(MASK))])),
    (Blocks(1, Ancestral(), shuffled=True), lambda model: law_of_one_at_a_time(model, anywhere)),
]


@pytest.mark.parametrize("case", range(len(EXACT)))
def test_samples_follow_the_enumerated_law(case):
    order, law = EXACT[case]
    model = tiny()
    r = sample(
        model, 6000, length=L, steps=2 if case == 0 else 5, n_loops=2, order=order, seed=case, batch_size=6000
    )
    assert agrees(r.tokens, law(model)) > 1e-4


def test_the_test_of_laws_can_fail():
    model = tiny()
    r = sample(model, 6000, length=L, steps=2, n_loops=2, batch_size=6000)
    assert agrees(r.tokens, law_of_steps(model, 50)) < 1e-4


def test_reveal_first_has_the_law_of_the_joint_draw():
    model = tiny()
    ids = textbook_sample(model, 6000, L, 4, n_loops=2, seed=1)
    law = law_of_steps(model, 4)
    assert agrees(ids, law) > 1e-4
    assert agrees(sample(model, 6000, length=L, steps=4, n_loops=2, batch_size=6000).tokens, law) > 1e-4


class Stub:
    """Answers at once; for tests of times and sizes."""

    def __init__(self, d_vocab: int, n_ctx: int):
        self.cfg = toy_config(d_vocab=d_vocab, n_ctx=n_ctx)

    def run(self, tokens, n_loops=None, stop=None, attention_mask=None, *, rows, on_loop=None):
        logits = torch.zeros(int(rows.sum()), self.cfg.d_vocab)
        logits[:, -1] = float("-inf")
        ones = torch.ones(len(tokens))
        return LoopOutput(logits, ones.long(), ones[None], ones.double())


def test_reveal_rate_at_a_large_vocabulary_is_the_closed_form():
    """Each position is revealed at a uniform one of 1,024 steps (float32 Gumbel noise gets 15% of that)."""
    r = sample(Stub(50_258, 1024), 2, steps=1024, n_loops=1)
    steps = r.events[:, 0].numpy()
    assert len(steps) == 2048
    counts = np.histogram(steps, bins=16, range=(0, 1024))[0]
    assert chisquare(counts).pvalue > 1e-4
    assert r.forwards + r.skipped == 2048 and r.forwards == len(np.unique(r.events[:, :2].numpy(), axis=0))
    tokens = r.tokens.flatten().numpy() / 50_257
    assert tokens.max() < 1 and kstest(tokens, "uniform").pvalue > 1e-4


def test_first_hitting_times_are_order_statistics():
    r = sample(Stub(5, 8), 4000, order="first-hitting", n_loops=1, batch_size=4000)
    assert r.times.shape == (9, 4000) and bool((r.times.diff(dim=0) < 0).all())
    for hit in (1, 4, 8):  # the hit-th largest of 8 uniforms has mean (9 - hit) / 9
        assert float(r.times[hit].mean()) == pytest.approx((9 - hit) / 9, abs=0.02)


def test_ancestral_times_are_equal_steps():
    r = sample(Stub(5, 8), 3, steps=10, n_loops=1)
    assert r.times[:, 0].tolist() == pytest.approx([1 - step / 10 for step in range(11)])
