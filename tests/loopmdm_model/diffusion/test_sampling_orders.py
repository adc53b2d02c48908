"""Orders and options of masked diffusion decoding: limits that are other orders, laws on a planted joint law."""

import itertools
import math

import numpy as np
import pytest
import torch

from loopmdm.model.diffusion.orders import (
    Blocks,
    Confidence,
    DrawnConfidence,
    EntropyBound,
    EvenRandom,
    Factor,
    FirstHitting,
    FixedOrder,
    HardestFirst,
    LowEntropy,
    Margin,
    Noised,
    OneShot,
    PathPlanning,
    Remask,
    StepView,
    Threshold,
    as_order,
    best,
    parse_order,
)
from loopmdm.model.diffusion.sampling import draw_tokens, sample
from loopmdm.model.errors import NotFiniteError, UsageError
from loopmdm.model.protocol import LoopOutput
from loopmdm.model.stopping.rules import StateDelta
from tests.conftest import toy_config, toy_model
from tests.loopmdm_model.diffusion.test_sampling_laws import MASK, L, V, agrees, independent, push

N = 6000


class Planted:
    """A model that knows the joint law of its sequences; its logits are the conditionals, at filled places too."""

    def __init__(self, seed: int = 0, sharpness: float = 1.2):
        self.cfg = toy_config(d_vocab=V + 1, n_ctx=L)
        weights = np.exp(np.random.default_rng(seed).normal(size=(V,) * L) * sharpness)
        self.joint = weights / weights.sum()
        states = itertools.product(range(V + 1), repeat=L)
        self.table = {state: np.stack([self.conditional(state, i) for i in range(L)]) for state in states}
        self.logits = torch.full((V + 1,) * L + (L, V + 1), float("-inf"), dtype=torch.float64)
        for state, rows in self.table.items():
            self.logits[state][:, :V] = torch.from_numpy(rows).log()

    def conditional(self, state, position):
        """P(token at `position` | the other ids)."""
        known = tuple(
            slice(None) if token == MASK or at == position else slice(token, token + 1)
            for at, token in enumerate(state)
        )
        p = self.joint[known].sum(tuple(at for at in range(L) if at != position))
        return p / p.sum()

    @property
    def law(self):
        return {state: float(self.joint[state]) for state in itertools.product(range(V), repeat=L)}

    def run(self, tokens, n_loops=None, stop=None, attention_mask=None, *, rows, on_loop=None):
        ones = torch.ones(len(tokens))
        return LoopOutput(self.logits[tuple(tokens.T)][rows], ones.long(), ones[None], ones.double())


@pytest.fixture(scope="module")
def planted():
    return Planted()


def tokens(planted, order, steps=L, **options):
    return sample(planted, N, L, steps, order=order, n_loops=1, batch_size=N, **options).tokens


# --- limits ---

SAME = {
    "threshold 0 is one shot": (Threshold(0.0), OneShot(), {}),
    "threshold 1 is one a step": (Threshold(1.0), DrawnConfidence(), {"steps": 12}),
    "factor inf is one shot": (Factor(math.inf), OneShot(), {}),
    "factor 0 is one a step": (Factor(0.0), DrawnConfidence(), {"steps": 12}),
    "entropy bound inf is one shot": (EntropyBound(math.inf), OneShot(), {}),
    "entropy bound 0 is one a step": (EntropyBound(0.0), LowEntropy(), {"steps": 12}),
    "the best tokens are the drawn ones": (DrawnConfidence(), Confidence(), {"steps": 5, "temperature": 0}),
    "no noise": (Noised(0.0, Margin()), Margin(), {"steps": 5}),
    "annealed away": (Noised(9.0, Margin(), annealed=True), OneShot(), {"steps": 1}),
    "log or not": (DrawnConfidence(log=True), DrawnConfidence(), {"steps": 5}),
    "planning that hides nothing": (PathPlanning(0.0), DrawnConfidence(), {"steps": 4}),
    "planning in one step": (PathPlanning(2.0), OneShot(), {"steps": 1}),
    "hiding nothing": (Remask(0.0), "random", {"steps": 7}),
    "hiding nothing in doubt": (Remask(0.0, "confidence"), "random", {"steps": 7}),
    "a block of everything": ("blocks:12:entropy-bound:0.3", EntropyBound(0.3), {}),
    "a block of everything, with draws": ("blocks:12:threshold:0.2", Threshold(0.2), {}),
}


@pytest.mark.parametrize("name", SAME)
def test_limits_are_other_orders(model, name):
    order, other, options = SAME[name]
    one, two = (sample(model, 6, 12, order=o, n_loops=2, seed=3, **options) for o in (order, other))
    assert torch.equal(one.tokens, two.tokens) and one.forwards == two.forwards


def test_between_the_limits_fewer_forwards(model):
    arguments = {"n": 6, "length": 12, "n_loops": 2, "seed": 3}
    for orders in (
        [Threshold(1.0), Threshold(0.2), Threshold(0.0)],
        [Factor(0.0), Factor(2.3), Factor(99.0)],
        [EntropyBound(0.0), EntropyBound(3.0), EntropyBound(99.0)],
    ):
        forwards = [sample(model, **arguments, order=order).forwards for order in orders]
        assert 72 == forwards[0] > forwards[1] > forwards[2] == 6


@pytest.mark.parametrize(
    ("scores", "order", "count"),
    [
        ([0.95, 0.92, 0.85, 0.1], Threshold(0.9), 2),
        ([0.5, 0.4, 0.3, 0.1], Threshold(0.9), 1),
        ([0.9, 0.8, 0.7, 0.1], Threshold(0.8), 1),  # above, not at
        ([0.95, 0.80, 0.76, 0.1], Factor(1.0), 3),  # 2 * 0.05, 3 * 0.2, 4 * 0.24 < 1 < 5 * 0.9
        ([0.95, 0.66, 0.80, 0.79], Factor(0.9), 3),  # 4 * 0.21 < 0.9 < 5 * 0.34
        ([-0.1, -0.3, -0.2, -2.0], EntropyBound(0.25), 2),  # 0, 0.1 <= 0.25 < 0.3
        ([-0.1, -0.3, -0.2, -2.0], EntropyBound(0.61), 4),  # the last one's own entropy does not count
    ],
)
def test_how_many_go_together_by_hand(scores, order, count):
    masked = torch.tensor([[True] * 4 + [False] * 2])
    view = StepView(
        torch.tensor([0]), torch.tensor([9]), masked, masked, torch.ones(1), torch.ones(1, 6),
        lambda _: torch.rand(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )  # fmt: skip
    scores = torch.tensor([[*scores, 0.0, 0.0]], dtype=torch.float64)
    chosen = order.choose(view, scores)
    assert int(chosen.sum()) == count
    kept = scores[0, :4].argsort(descending=True)[:count]
    assert sorted(chosen[0].nonzero().flatten().tolist()) == sorted(kept.tolist())


def test_planning_keeps_the_announced_number_and_hides_the_worst(model):
    r = sample(model, 4, 12, steps=6, order=PathPlanning(1.0), n_loops=2, seed=1)
    masked = (r.history == 22).sum(-1)
    assert masked.tolist() == [[12 - 12 * k // 6] * 4 for k in range(7)]
    hidden = int((r.events[:, 3] == 22).sum())
    more = sample(model, 4, 12, steps=6, order=PathPlanning(50.0), n_loops=2, seed=1)
    assert 0 < hidden < int((more.events[:, 3] == 22).sum())


# --- laws ---

ONE_AT_A_TIME = [
    FirstHitting(),
    Confidence(),
    Margin(),
    LowEntropy(),
    HardestFirst(),
    FixedOrder(),
    EvenRandom(),
    EntropyBound(0.0),
    Noised(0.5, Confidence()),
    Noised(2.0, LowEntropy(), annealed=True),
    Blocks(1, Threshold(0.9)),
    Blocks(1, DrawnConfidence(), shuffled=True),
]


@pytest.mark.parametrize("order", ONE_AT_A_TIME, ids=str)
def test_one_at_a_time_has_the_planted_law_where_draws_do_not_rank(planted, order):
    assert agrees(tokens(planted, order, seed=1), planted.law) > 1e-4


@pytest.mark.parametrize(
    "order", [DrawnConfidence(), Threshold(1.0), Noised(0.1), PathPlanning(), OneShot()], ids=str
)
def test_where_draws_rank_or_come_together_the_law_is_another(planted, order):
    assert agrees(tokens(planted, order, seed=1), planted.law) < 1e-4


def draws(planted, state):
    """All that may be drawn at the masked positions: (chance, {position: token})."""
    masked = [position for position in range(L) if state[position] == MASK]
    for drawn in itertools.product(range(V), repeat=len(masked)):
        chosen = dict(zip(masked, drawn, strict=True))
        yield math.prod(planted.table[state][at][token] for at, token in chosen.items()), chosen


def law_of_draws(planted, steps, choices):
    """`choices(state, drawn, step)` lists (chance, positions that are filled afterwards)."""
    law = {(MASK,) * L: 1.0}
    for step in range(steps):

        def moves(state, step=step):
            for chance, drawn in draws(planted, state):
                for share, filled in choices(state, drawn, step):
                    ids = [drawn.get(at, state[at]) for at in range(L)]
                    yield chance * share, tuple(ids[at] if at in filled else MASK for at in range(L))

        law = push(law, moves)
    return law


def before(state):
    return {at for at in range(L) if state[at] != MASK}


def sure(planted, state, drawn):
    """Drawn positions by probability, best first, with the probabilities."""
    found = {at: planted.table[state][at][token] for at, token in drawn.items()}
    return sorted(found, key=found.get, reverse=True), found


def in_parallel(planted, count):
    def choices(state, drawn, step):
        ranked, found = sure(planted, state, drawn)
        n = max(1, count([found[at] for at in ranked]))
        return [(1.0, before(state) | set(ranked[:n]))]

    return choices


def noised(planted, temperature):
    def choices(state, drawn, step):
        ranked, found = sure(planted, state, drawn)
        scale = temperature(step)
        if scale == 0:
            return [(1.0, before(state) | set(ranked[:1]))]
        weight = {at: math.exp(math.log(found[at]) / scale) for at in ranked}
        return [(weight[at] / sum(weight.values()), before(state) | {at}) for at in ranked]

    return choices


def planning(planted, eta):
    def choices(state, drawn, step):
        score = {
            at: math.log(planted.table[state][at][drawn.get(at, state[at])]) * (1 if at in drawn else eta)
            for at in range(L)
        }
        return [(1.0, set(sorted(range(L), key=score.get, reverse=True)[: step + 1]))]

    return choices


def below(p, factor=1.2):
    return max((n for n in range(1, len(p) + 1) if (n + 1) * (1 - p[n - 1]) < factor), default=1)


LOG = DrawnConfidence(log=True)
ENUMERATED = {
    "drawn, one a step": (DrawnConfidence(), 3, lambda m: in_parallel(m, lambda p: 1)),
    "drawn, two then one": (DrawnConfidence(), 2, lambda m: in_parallel(m, lambda p: -(-len(p) // 2))),
    "threshold": (Threshold(0.5), 3, lambda m: in_parallel(m, lambda p: sum(c > 0.5 for c in p))),
    "factor": (Factor(1.2), 3, lambda m: in_parallel(m, below)),
    "noised": (Noised(0.8, LOG), 3, lambda m: noised(m, lambda step: 0.8)),
    "maskgit": (Noised(3.0, LOG, annealed=True), 3, lambda m: noised(m, lambda step: 2.0 - step)),
    "planning": (PathPlanning(1.0), 3, lambda m: planning(m, 1.0)),
    "hasty planning": (PathPlanning(3.0), 3, lambda m: planning(m, 3.0)),
}


@pytest.mark.parametrize("name", ENUMERATED)
def test_samples_follow_the_enumerated_law(planted, name):
    order, steps, choices = ENUMERATED[name]
    law = law_of_draws(planted, steps, choices(planted))
    assert agrees(tokens(planted, order, steps, seed=2), law) > 1e-4


def test_the_loop_schedule_has_its_law():
    """Fill to 0.6 by t = 0.6, hold while a fifth of what is filled is hidden again, fill the rest from t = 0.2."""
    planted = Planted(sharpness=3.0)
    shares = {1.0: 1.0, 0.8: 0.7, 0.6: 0.4, 0.4: 0.4, 0.2: 0.4, 0.0: 0.0}
    order = Remask(0.2, "loop", plateau=(0.6, 0.2, 0.6))
    law = {(MASK,) * L: 1.0}
    for t, s in itertools.pairwise(shares.values()):
        sigma = 0.2 if t == s else 0.0
        reveal = ((1 - s) - (1 - sigma) * (1 - t)) / t

        def choices(state, position, reveal=reveal, sigma=sigma):
            if state[position] != MASK:
                return [(1 - sigma, state[position]), (sigma, MASK)]
            p = planted.table[state][position]
            return [(1 - reveal, MASK)] + [(reveal * p[v], v) for v in range(V)]

        law = push(law, independent(choices))
    r = sample(planted, N, L, 5, order=order, n_loops=1, batch_size=N, seed=4)
    assert agrees(r.tokens, law) > 1e-4
    assert r.times[:, 0].tolist() == pytest.approx(list(shares.values()))
    assert agrees(tokens(planted, "random", 5, seed=4), law) < 1e-4


def left_to_right(table, start):
    law = {start: 1.0}
    for position in [at for at in range(L) if start[at] == MASK]:

        def moves(state, position=position):
            for v in range(V):
                yield table(state)[position][v], (*state[:position], v, *state[position + 1 :])

        law = push(law, moves)
    return law


def normed(p):
    return p / p.sum(-1, keepdims=True)


def test_guidance_reads_what_the_clues_change(planted):
    def table(state, w=1.5):
        blind = (MASK, *state[1:])
        return normed(planted.table[state] ** (1 + w) / planted.table[blind] ** w)

    got = tokens(planted, "left-to-right", seed=5, clues={0: 1}, guidance=1.5)
    assert agrees(got, left_to_right(table, (1, MASK, MASK))) > 1e-4
    plain = tokens(planted, "left-to-right", seed=5, clues={0: 1})
    assert agrees(plain, left_to_right(lambda state: planted.table[state], (1, MASK, MASK))) > 1e-4
    assert agrees(plain, left_to_right(table, (1, MASK, MASK))) < 1e-4


def test_suppressed_ids_are_conditioned_away(planted):
    law = left_to_right(lambda state: normed(planted.table[state] * [1, 0, 1]), (MASK,) * L)
    got = tokens(planted, "left-to-right", seed=6, suppress=[1])
    assert not bool((got == 1).any()) and agrees(got, {ids: p for ids, p in law.items() if p > 0}) > 1e-4


def test_top_k_keeps_the_most_probable(planted):
    def table(state):
        p = planted.table[state].copy()
        p[np.arange(L), p.argmin(-1)] = 0.0
        return normed(p)

    law = left_to_right(table, (MASK,) * L)
    got = tokens(planted, "left-to-right", seed=7, top_k=2)
    assert agrees(got, {ids: p for ids, p in law.items() if p > 0}) > 1e-4


# --- options ---


def test_top_k_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for top_k, top_p, expected in (
        (2, 1.0, [0.625, 0.375, 0, 0]),
        (3, 0.82, [0.625, 0.375, 0, 0]),  # 0.8 of all four, 0.84 of the three
        (None, 0.82, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (9, 1.0, [0.5, 0.3, 0.15, 0.05]),
    ):
        share = torch.bincount(draw_tokens(logits, uniforms, 1.0, top_p, top_k)[0], minlength=4) / 4000
        torch.testing.assert_close(share.double(), torch.tensor(expected).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("order", ["random", "confidence", "threshold:0.3"])
def test_limits_of_the_options(model, order):
    arguments = {"n": 4, "length": 12, "steps": 5, "order": order, "n_loops": 2, "seed": 1}
    plain = sample(model, **arguments)
    for same in (
        {"top_k": 23},
        {"guidance": 0.0},
        {"suppress": []},
        {"suppress": 22},
        {"guidance": 2.0},
        {"end": []},
    ):
        assert torch.equal(sample(model, **arguments, **same).tokens, plain.tokens)  # no clues: nothing to guide
    best = sample(model, **arguments, temperature=0)
    assert torch.equal(sample(model, **arguments, top_k=1).tokens, best.tokens)
    few = sample(model, **arguments, suppress=range(3, 22))
    assert set(few.tokens.unique().tolist()) <= {0, 1, 2}


def test_guidance_costs_a_second_forward(model):
    arguments = {"n": 4, "length": 12, "steps": 5, "clues": {0: 3}, "seed": 1}
    plain, guided = (sample(model, **arguments, guidance=w) for w in (0.0, 2.0))
    assert guided.flops == 2 * plain.flops and torch.equal(guided.loops_used, plain.loops_used)
    assert not torch.equal(guided.tokens, plain.tokens) and (guided.tokens[:, 0] == 3).all()


def test_guidance_of_nothing_costs_nothing_and_changes_nothing(model):
    clues = torch.full((4, 12), -1)
    clues[2:, 0] = 3
    arguments = {"clues": clues, "steps": 5, "seed": 1}
    plain, guided = (sample(model, **arguments, guidance=w) for w in (0.0, 2.0))
    assert torch.equal(guided.step_flops[:, :2], plain.step_flops[:, :2])
    assert torch.equal(guided.step_flops[:, 2:], 2 * plain.step_flops[:, 2:])
    assert torch.equal(guided.tokens[:2], plain.tokens[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guidance_in_half_precision_overflows_nowhere(dtype):
    m = toy_model().to(dtype)
    with torch.no_grad():
        m.unembed.weight *= 300  # logits of some hundreds: 1000 times their differences is beyond float16
    r = sample(m, 4, 12, clues={0: 3}, guidance=1000, steps=4, n_loops=1)
    assert not bool((r.tokens == 22).any())


@pytest.mark.parametrize("guidance", [0.0, 0.5])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_before_it_is_drawn_from(hooked, number, guidance):
    with (
        hooked.hooks([("hook_logits", lambda logits, hook: logits.index_fill(-1, torch.tensor(4), number))]),
        pytest.raises(NotFiniteError),
    ):
        sample(hooked, 2, 8, clues={0: 3}, guidance=guidance, steps=2)


def test_what_guidance_made_of_logits_is_looked_at_again(hooked):
    """Each reading is finite; their difference is not."""
    numbers = itertools.cycle((3e38, -3e38))

    def far(logits, hook):
        return logits.index_fill(-1, torch.tensor(4), next(numbers))

    with hooked.hooks([("hook_logits", far)]), pytest.raises(NotFiniteError):
        sample(hooked, 2, 8, clues={0: 3}, guidance=100, steps=2)


def test_all_but_one_word_may_be_suppressed_mask_or_not(model):
    for suppress in (range(1, 22), range(1, 23)):
        assert sample(model, 2, 8, suppress=suppress, steps=2).tokens.unique().tolist() == [0]


@pytest.mark.parametrize("order", ["random", "confidence", "path-planning"])
def test_no_mask_is_drawn_where_a_hook_leaves_nothing_else(hooked, order):
    """Of the ids that are not suppressed; the run itself would not see it."""

    def closed(logits, hook):
        return logits.index_fill(-1, torch.arange(5), float("-inf"))

    with hooked.hooks([("hook_logits", closed)]), pytest.raises(UsageError, match="is left to draw"):
        sample(hooked, 2, 8, order=order, suppress=range(5, 22), steps=2)

    def only_mask(logits, hook):
        return torch.full_like(logits, float("-inf")).index_fill(-1, torch.tensor(22), 0.0)

    with hooked.hooks([("hook_logits", only_mask)]), pytest.raises(UsageError, match="is left to draw"):
        sample(hooked, 2, 8, order=order, steps=2)


def test_the_logits_that_a_hook_keeps_stay_what_they_were(hooked):
    kept = []
    with hooked.hooks([("hook_logits", lambda logits, hook: kept.append((logits, logits.clone())))]):
        sample(hooked, 2, 8, suppress=[1, 2], clues={0: 3}, guidance=0.5, steps=2)
    assert kept and all(torch.equal(one, two) and bool(one[..., 1].isfinite().all()) for one, two in kept)


class Counted(Threshold):
    """Counts how often it is asked."""

    asked = 0

    def choose(self, view, scores):
        type(self).asked += 1
        return super().choose(view, scores)


def test_steps_without_a_masked_position_ask_nobody(model):
    r = sample(model, 3, 12, order=Counted(0.0), n_loops=2)
    assert Counted.asked == 1 and r.loops_used.shape == (12, 3)
    assert r.loops_used[0].tolist() == [2, 2, 2] and not r.loops_used[1:].any() and not r.step_flops[1:].any()
    assert r.times.shape == (13, 3) and (r.history[1:] == r.tokens).all()


def test_time_goes_on_where_nothing_is_masked_any_more(model):
    arguments = {"n": 2, "length": 8, "steps": 8, "order": "random", "n_loops": 1}
    stopped = sample(model, **arguments, end=range(22))  # the first token ends all before it is masked
    assert torch.equal(stopped.times, sample(model, **arguments).times) and stopped.times[-1].tolist() == [
        0.0,
        0.0,
    ]


def test_path_planning_runs_no_forward_once_all_is_filled(model):
    clues = torch.arange(12).repeat(2, 1)
    clues[0, 3], clues[1, :8] = -1, -1
    r = sample(model, clues=clues, steps=16, order="path-planning", n_loops=1)
    masked = (r.history[:-1] == 22).sum(-1)
    assert (
        torch.equal(r.loops_used > 0, masked > 0)
        and masked[:, 0].sum() == 1
        and 8 < masked[:, 1].count_nonzero() < 16
    )


def test_path_planning_ranks_once_a_step(model, monkeypatch):
    from loopmdm.model.diffusion import remasking

    ranked = []
    monkeypatch.setattr(remasking, "best", lambda *given: ranked.append(1) or best(*given))
    sample(model, 2, 12, steps=4, order="path-planning", n_loops=1)
    assert len(ranked) == 4


@pytest.mark.parametrize("order", ["left-to-right", "blocks:4", "confidence", "first-hitting", "entropy-bound"])
def test_a_text_ends_where_it_would_have_ended(model, order):
    arguments = {"n": 24, "length": 12, "steps": 12, "order": order, "n_loops": 1, "seed": 2}
    arguments |= {"clues": {0: 5, 11: 4}}  # an id that ends texts in the prompt ends none, and clues stay
    plain, stopped = sample(model, **arguments), sample(model, **arguments, end=[5, 7, 9, 15])
    cut = 0
    for before, after in zip(plain.tokens.tolist(), stopped.tokens.tolist(), strict=True):
        ends = [at for at in range(1, 11) if after[at] in (5, 7, 9, 15)]
        if not ends:
            assert before == after
            continue
        first = ends[0]
        assert after[: first + 1] == before[: first + 1] and after[11] == 4
        cut += after != before
    assert cut and stopped.forwards < plain.forwards
    assert torch.equal(stopped.history[-1], stopped.tokens)


def test_what_is_filled_behind_an_end_is_the_end(model):
    r = sample(model, 12, 12, steps=12, order="left-to-right", n_loops=1, seed=2, end=7)
    texts = [row for row in r.tokens.tolist() if 7 in row]
    assert texts and all(set(row[row.index(7) :]) == {7} for row in texts)


@pytest.mark.parametrize(
    "options",
    [{"guidance": 1.5}, {"top_k": 3, "top_p": 0.8}, {"suppress": [1, 2, 3]}, {"end": [4, 9]}],
    ids=str,
)
@pytest.mark.parametrize("order", ["random", "confidence", "blocks:4:threshold:0.2", "maskgit"])
def test_options_keep_a_sequence_what_it_is_alone(model, order, options):
    clues = torch.full((8, 12), -1)
    for row in range(8):
        clues[row, : row % 4] = torch.arange(row % 4) + 10
    arguments = {"steps": 6, "order": order, "seed": 5, "stop": StateDelta(0.8, max_loops=3)} | options
    together = sample(model, clues=clues, batch_size=8, **arguments)
    for row in (0, 3, 7):
        alone = sample(model, clues=clues[row], first_index=row, **arguments)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.flops == float(together.step_flops[:, row].sum())


# --- names and misuse ---


class Timed(Margin):
    """An order with a diffusion time of its own."""

    def advance(self, view):
        return view.interval[1][:, 0]


class Hiding(Margin):
    """An order that hides, and does not say so."""

    def remask(self, view, scores=None):
        return view.free & ~view.masked


class Deciding(Margin):
    """An order that hides where one computation gives both."""

    def decide(self, view, scores):
        return view.masked, view.free & ~view.masked


def test_an_order_that_hides_may_hide_where_nothing_is_masked_any_more(model):
    r = sample(model, 2, 6, order=Deciding(), steps=4, n_loops=2)
    hidden = r.history[1:] == 22
    assert hidden[1::2].all() and not hidden[::2].any()
    assert r.loops_used.tolist() == [[2, 2], [0, 0], [2, 2], [0, 0]]


@pytest.mark.parametrize("order", [Hiding(), Deciding(), PathPlanning(), Remask()])
def test_what_may_hide_says_so(model, order):
    assert order.hides and not any(kept.hides for kept in (Margin(), Noised(), Blocks(4)))
    with pytest.raises(UsageError, match="an order that keeps what it filled"):
        sample(model, 1, 6, order=order, end=3)


def test_orders_by_name_and_number():
    assert as_order("threshold:0.7", 8) == Threshold(0.7) and as_order("factor", 8) == Factor(1.0)
    assert parse_order("blocks:8:threshold:0.9") == Blocks(8, Threshold(0.9))
    assert parse_order("random-blocks:4:entropy") == Blocks(4, LowEntropy(), shuffled=True)
    assert parse_order("remask:0.2") == Remask(0.2) and parse_order("entropy-bound:0.5") == EntropyBound(0.5)
    assert parse_order("remask-loop").eta == 0.02 and parse_order("remask").eta == 0.1
    assert Remask(schedule="confidence").eta == 1.0 and Remask(schedule="rescale").eta == 0.1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Threshold(1.5), "threshold must be a number in 0..1"),
        (lambda: Threshold(True), "threshold"),
        (lambda: Factor(-1), "factor must be a number of at least 0"),
        (lambda: EntropyBound(float("nan")), "gamma"),
        (lambda: Noised(-0.1), "temperature"),
        (lambda: Noised(1.0, FixedOrder()), "noise cannot rank"),
        (lambda: Noised(1.0, Threshold()), "noise cannot rank"),
        (lambda: Noised(1.0, PathPlanning()), "noise cannot rank PathPlanning"),
        (lambda: Noised(1.0, Noised()), "noise cannot rank Noised"),
        (lambda: Noised(1.0, EvenRandom()), "noise cannot rank EvenRandom"),
        (lambda: Noised(1.0, Timed()), "noise cannot rank Timed"),
        (lambda: Blocks(4, Hiding()), "blocks cannot hold Hiding"),
        (lambda: Blocks(4, Deciding()), "blocks cannot hold Deciding"),
        (lambda: PathPlanning(-1), "eta"),
        (lambda: Remask(1.1), "eta"),
        (lambda: Remask(schedule="switch"), '"cap", "rescale", "confidence" or "loop"'),
        (lambda: Remask(schedule="loop", plateau=(0.1, 0.5, 0.9)), "t_off <= t_on"),
        (lambda: Blocks(4, PathPlanning()), "blocks cannot hold PathPlanning"),
        (lambda: Blocks(4, Remask()), "blocks cannot hold Remask"),
        (lambda: parse_order("threshold:high"), "no number; write threshold:0.5"),
        (lambda: parse_order("threshold:"), "no number"),
        (lambda: parse_order("entropy:1"), "unknown order"),
        (lambda: parse_order("blocks:8:sideways"), "unknown order"),
        (lambda: parse_order("blocks:4:path-planning"), "blocks cannot hold"),
        (lambda: parse_order("tresholds"), "did you mean threshold"),
    ],
)
def test_orders_refuse_in_one_line(make, says):
    with pytest.raises(UsageError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"guidance": "much"}, "guidance must be a number"),
        ({"suppress": [23]}, r"suppress has id 23, which is outside 0..22"),
        ({"suppress": ["a"]}, "an id of suppress must be an integer"),
        ({"suppress": None}, "an id of suppress must be an integer"),
        ({"end": 1.5}, "an id of end must be an integer"),
        ({"suppress": range(22)}, "leaves no id"),
        ({"suppress": [*range(23)]}, "leaves no id"),
        ({"guidance": 1e5, "clues": {0: 3}}, "guidance must be a number in 0..1000"),
        ({"end": -1}, "an id of end"),
        ({"end": [40]}, "end has id 40"),
        ({"end": 3, "order": "remask"}, "an order that keeps what it filled"),
        ({"end": 3, "order": "path-planning"}, "an order that keeps what it filled"),
    ],
)
def test_options_refuse_in_one_line(model, options, says):
    with pytest.raises(UsageError, match=says) as caught:
        sample(model, 1, 8, **options)
    assert "\n" not in str(caught.value)
