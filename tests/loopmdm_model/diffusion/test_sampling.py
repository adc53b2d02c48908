"""Samplers alone and in batches, their orders, costs and misuse."""

import itertools

import pytest
import torch

from loopmdm.model.diffusion.orders import (
    ORDERS,
    Ancestral,
    Blocks,
    Confidence,
    FirstHitting,
    LowEntropy,
    Margin,
    OneShot,
    Remask,
    StepView,
    as_order,
    best,
)
from loopmdm.model.diffusion.sampling import draw_tokens, sample
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import hide, mask_tokens
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.stopping.rules import (
    ArgmaxStable,
    EntropyDelta,
    FixedLoops,
    KLDelta,
    NoiseSchedule,
    SecondDifference,
    StateDelta,
)

EVERY = [*ORDERS, "blocks:4", "random-blocks:3", Blocks(4, Ancestral()), Blocks(3, FirstHitting(), shuffled=True),
         Remask(0.5, "rescale"), Remask(0.9, "confidence"), list(range(11, -1, -1)), Remask(0.9, "loop"),
         "threshold:0.2", "factor:2.3", "entropy-bound:3", "noised:1", "path-planning:5",
         "blocks:4:threshold:0.2", "random-blocks:4:entropy-bound:2"]  # fmt: skip
RULES = [
    None,
    StateDelta(0.8, max_loops=4),
    StateDelta(0.8, max_loops=4, scope="token"),
    KLDelta(0.3, max_loops=4),
    KLDelta(0.3, max_loops=4, lens="direct", scope="token"),
    SecondDifference(0.4, max_loops=4),
    EntropyDelta(0.2, max_loops=4, scope="token"),
    ArgmaxStable(0.3, max_loops=4, patience=1),
    NoiseSchedule(loops=(1, 2, 4)),
]


BY_ALL_RULES = ("random", "first-hitting", "confidence", "remask", "blocks:4", "threshold:0.2", "path-planning:5")
EACH = [(order, rule) for order in EVERY for rule in (RULES if order in BY_ALL_RULES else RULES[::4])]


@pytest.mark.parametrize(("order", "rule"), EACH, ids=str)
def test_a_sequence_alone_is_the_sequence_in_a_batch(model, order, rule):
    clues = torch.full((16, 12), -1)
    for row in range(16):  # different numbers of clues
        clues[row, : row % 5] = torch.arange(row % 5)
    arguments = {"steps": 6, "order": order, "stop": rule, "seed": 5}
    together = sample(model, clues=clues, batch_size=16, **arguments)
    again = sample(model, clues=clues, batch_size=5, **arguments)
    assert torch.equal(together.tokens, again.tokens)
    for row in (0, 7, 15):
        alone = sample(model, clues=clues[row], first_index=row, **arguments)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        used = together.loops_used[:, row]
        assert alone.loops_used[:, 0].tolist() == used[: len(alone.loops_used)].tolist()
        assert alone.flops == float(together.step_flops[:, row].sum())


@pytest.mark.parametrize("order", EVERY, ids=str)
def test_clues_stay_and_everything_is_filled(model, order):
    clues = torch.full((8, 12), -1)
    clues[:, 3], clues[4:, 9] = 7, 2
    r = sample(model, clues=clues, steps=5, order=order, n_loops=1, seed=2)
    history = r.history
    assert (history[:, :, 3] == 7).all() and (history[:, 4:, 9] == 2).all()
    assert torch.equal(history[0], torch.where(clues >= 0, clues, 22)) and torch.equal(history[-1], r.tokens)
    assert int((r.tokens == 22).sum()) == 0
    if not as_order(order, 12).hides:
        filled = (history[1:] != history[:-1]).sum(0)
        assert torch.equal(filled, (clues < 0).long())  # once each


def test_orders_fill_in_their_order(model):
    def steps_of(order, **arguments):
        r = sample(model, 2, 12, order=order, n_loops=1, **arguments)
        when = torch.zeros(2, 12, dtype=torch.long)
        when[r.events[:, 1], r.events[:, 2]] = r.events[:, 0]
        return when

    assert steps_of("left-to-right", steps=12).tolist() == [list(range(12))] * 2
    assert steps_of("row-major", steps=4).tolist() == [[i // 3 for i in range(12)]] * 2
    assert steps_of(list(range(11, -1, -1)), steps=12).tolist() == [list(range(11, -1, -1))] * 2
    assert steps_of("one-shot").tolist() == [[0] * 12] * 2
    blocks = steps_of("blocks:4", steps=6)
    assert (blocks // 2 == torch.arange(12) // 4).all()
    shuffled = steps_of("random-blocks:4", steps=3)
    assert all(
        sorted(row[::4].tolist()) == [0, 1, 2] and (row.view(3, 4) == row[::4, None]).all() for row in shuffled
    )


def test_confidence_commits_the_most_confident(model):
    r = sample(model, 1, 10, steps=10, order=Confidence(), n_loops=2, temperature=0)
    history = r.history
    for before, after in itertools.pairwise(history):
        probabilities = model(before, n_loops=2).softmax(-1)[0].masked_fill((before[0] != 22)[:, None], 0)
        place = int((before != after)[0].nonzero())
        assert float(probabilities[place].max()) >= float(probabilities.max()) - 2e-5
        assert int(after[0, place]) == int(probabilities[place].argmax())


def test_ranks_by_hand():
    probabilities = torch.tensor([[0.6, 0.35, 0.05], [0.5, 0.25, 0.25], [0.9, 0.1, 0.0]])
    log_probs = probabilities.log()
    assert Margin().scores(log_probs).tolist() == pytest.approx([0.25, 0.25, 0.8], abs=1e-6)
    entropy = -(probabilities * log_probs).nan_to_num(0.0).sum(-1)
    assert LowEntropy().scores(log_probs).tolist() == pytest.approx((-entropy).tolist(), abs=1e-5)


def test_equal_scores_go_by_lot_and_others_by_rank():
    scores = torch.tensor([[0.5, 0.5 + 1e-7, 0.9, 0.1]]).double()
    among, count = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])
    for lots, expected in (([0.1, 0.2, 0.9, 0.0], [0, 2]), ([0.2, 0.1, 0.9, 0.0], [1, 2])):
        chosen = best(scores, among, count, torch.tensor([lots]).double())
        assert chosen[0].nonzero().flatten().tolist() == expected
    assert best(scores[:, :1], among[:, :1], torch.tensor([1]), scores[:, :1]).tolist() == [[True]]


def test_doubtful_tokens_are_hidden_again_most():
    n = 4000
    confidence = torch.tensor([0.1, 0.5, 0.9, 1.0]).double().expand(n, 4)
    masked = torch.tensor([False, False, False, True]).expand(n, 4)
    view = StepView(
        torch.full((n,), 5), torch.full((n,), 10), masked, torch.ones_like(masked), torch.ones(n), confidence,
        lambda _: torch.rand(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )  # fmt: skip
    share = Remask(0.9, "confidence").remask(view).double().mean(0)
    sigma = 0.9 * min(1.0, 0.4 / 0.5)
    expected = torch.tensor([0.1, 0.5, 0.9]).double().neg().softmax(-1) * sigma
    torch.testing.assert_close(share[:3], expected, atol=0.025, rtol=0)
    assert share[3] == 0


@pytest.mark.parametrize("order", ["random", "confidence", "blocks:1", "first-hitting", "remask"])
def test_one_token_is_a_sequence(model, order):
    assert int((sample(model, 2, 1, steps=2, order=order, n_loops=1).tokens == 22).sum()) == 0


@pytest.mark.parametrize("inner", [FirstHitting(), OneShot(), Confidence(), Ancestral()])
@pytest.mark.parametrize("steps", [3, 4, 5, 12])
def test_blocks_fill_everything_whatever_the_steps(model, inner, steps):
    r = sample(model, 2, 12, steps=steps, order=Blocks(4, inner), n_loops=1)
    assert int((r.tokens == 22).sum()) == 0


def test_padding_of_a_masked_batch_is_neither_filled_nor_seen(model, clean):
    real = torch.ones_like(clean)
    real[0, 6:] = 0
    b = mask_tokens(clean, 22, mask_ratio=0.5, attention_mask=real)
    r = sample(model, clues=b, steps=3, seed=1)
    short = MaskedBatch(b.tokens[:1, :6], clean[:1, :6], b.masked[:1, :6])
    alone = sample(model, clues=short, steps=3, seed=1)
    assert torch.equal(r.tokens[0, :6], alone.tokens[0])
    assert torch.equal(r.tokens[0, 6:], clean[0, 6:])


def test_hardest_first_is_the_opposite(model):
    first = sample(model, 1, 10, steps=10, order="confidence", n_loops=2, clues={0: 3, 5: 8}).events[0, 2]
    last = sample(model, 1, 10, steps=10, order="hardest-first", n_loops=2, clues={0: 3, 5: 8}).events[0, 2]
    start = torch.full((1, 10), 22)
    start[0, 0], start[0, 5] = 3, 8
    top = model(start, n_loops=2).softmax(-1)[0].amax(-1)
    free = [position for position in range(10) if position not in (0, 5)]
    assert int(first) == max(free, key=lambda p: float(top[p]))
    assert int(last) == min(free, key=lambda p: float(top[p]))


def test_draws_follow_temperature_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, float("-inf")]])
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    rows = logits.expand(4000, -1)
    for temperature in (0.5, 1.0, 3.0):
        tokens, sure = draw_tokens(rows, uniforms, temperature, 1.0)
        expected = (logits[0].double() / temperature).softmax(-1)
        share = torch.bincount(tokens, minlength=4) / 4000
        torch.testing.assert_close(share.double(), expected, atol=1e-3, rtol=0)
        torch.testing.assert_close(sure, expected[tokens])
    probabilities = logits[0].softmax(-1)
    kept, _ = draw_tokens(rows, uniforms, 1.0, float(probabilities[0]) + 0.01)
    share = torch.bincount(kept, minlength=4) / 4000
    torch.testing.assert_close(share[:2], probabilities[:2] / probabilities[:2].sum(), atol=1e-3, rtol=0)
    assert share[2:].sum() == 0
    assert set(draw_tokens(rows, uniforms, 1.0, 0.3)[0].tolist()) == {0}
    assert set(draw_tokens(rows, uniforms, 0.0, 1.0)[0].tolist()) == {0}


def test_same_seed_same_sample_other_seed_another(model):
    one, two, other = (sample(model, 4, 12, steps=4, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_flops_are_the_sum_over_the_forwards(model, rule):
    kept = []

    class Recording:
        cfg = model.cfg

        def run(self, *arguments, **keywords):
            kept.append(model.run(*arguments, **keywords))
            return kept[-1]

    for order in ("random", "confidence"):
        kept.clear()
        r = sample(Recording(), 6, 12, steps=5, stop=rule, order=order, batch_size=4)
        assert r.flops == sum(float(run.flops.sum()) for run in kept)
        assert r.forwards == sum(len(run.loops_used) for run in kept)
        assert int(r.loops_used.sum()) == sum(int(run.loops_used.sum()) for run in kept)


def test_logits_only_where_something_is_drawn(model):
    rows = []

    class Watching:
        cfg = model.cfg

        def run(self, tokens, **keywords):
            rows.append(int(keywords["rows"].sum()))
            return model.run(tokens, **keywords)

    r = sample(Watching(), 4, 12, steps=50, n_loops=1)
    assert sum(rows) == 48 == len(r.events) and r.skipped > 0


def test_threshold_zero_and_infinity_in_sampling(model):
    full = sample(model, 3, 10, steps=4, n_loops=4, seed=1)
    for scope in ("sequence", "token"):
        same = sample(model, 3, 10, steps=4, stop=StateDelta(0.0, max_loops=4, scope=scope), seed=1)
        assert torch.equal(same.tokens, full.tokens) and set(same.loops_used.unique().tolist()) <= {0, 4}
        least = sample(model, 3, 10, steps=4, stop=StateDelta(float("inf"), max_loops=4, scope=scope), seed=1)
        assert set(least.loops_used.unique().tolist()) <= {0, 2}


def test_prompts_come_first_and_may_differ(model, hooked):
    r = sample(model, prompt=[[1, 2, 3], [4]], length=8, steps=3)
    assert r.tokens[0, :3].tolist() == [1, 2, 3] and r.tokens[1, 0] == 4 and len(r.tokens) == 2
    r = sample(hooked, 3, prompt=torch.tensor([5, 6]), length=8, steps=3)
    assert r.tokens[:, :2].tolist() == [[5, 6]] * 3
    full = sample(model, prompt=list(range(8)), length=8)
    assert full.tokens.tolist() == [list(range(8))] and full.forwards == 0 and full.flops == 0


def test_infilling_from_a_masked_batch(model, clean):
    masked = torch.zeros_like(clean, dtype=torch.bool)
    masked[:, 4:7] = True
    b = hide(clean, masked, 22)
    r = sample(model, clues=b, steps=3)
    assert torch.equal(r.tokens[~masked], clean[~masked]) and torch.equal(r.start, b.tokens)


def test_callbacks_see_every_step_and_loop(model):
    seen = []
    r = sample(model, 3, 10, steps=4, n_loops=2, order="confidence", first_index=5,
               callback=[lambda s: seen.append((s.step, s.view.loop, s.sequences.tolist()))])  # fmt: skip
    assert seen == [(step, loop, [5, 6, 7]) for step in range(4) for loop in range(2)]
    assert r.flops == sample(model, 3, 10, steps=4, n_loops=2, order="confidence", first_index=5).flops


def test_an_interruption_keeps_finished_batches_if_asked(model):
    def interrupt(seen):
        if seen.sequences[0] >= 4:
            raise KeyboardInterrupt

    arguments = {"n": 6, "length": 8, "steps": 3, "batch_size": 2}
    r = sample(model, **arguments, callback=interrupt, partial=True)
    assert torch.equal(r.tokens, sample(model, **arguments).tokens[:4])
    with pytest.raises(KeyboardInterrupt):
        sample(model, **arguments, callback=interrupt)
    nothing = sample(model, 2, 8, steps=3, partial=True, first_index=4, callback=interrupt)
    assert len(nothing.tokens) == 0 and nothing.history.shape[1:] == (0, 8) and nothing.flops == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"steps": 0}, "steps"),
        ({"n": 0}, "n must be"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p"),
        ({"length": 17}, "n_ctx = 16"),
        ({"prompt": [1] * 17}, "prompt of 17 tokens"),
        ({"prompt": "text"}, "tokenizer"),
        ({"prompt": [1.5]}, "token ids"),
        ({"clues": {2: 22}}, r"a clue is \[MASK\]"),
        ({"clues": torch.tensor([1, 22, -1])}, r"id 22 at position 1 is \[MASK\]"),
        ({"clues": torch.tensor([1, 40, -1])}, "outside 0..22"),
        ({"clues": {99: 1}}, "position 99"),
        ({"clues": {0: -1}}, "leave free"),
        ({"clues": torch.zeros(3)}, "clues must be"),
        ({"clues": [[1, 2], [3]]}, "clues must be"),
        ({"clues": "abc"}, "clues must be"),
        ({"clues": {0.7: 1}}, "integers"),
        ({"clues": torch.full((3,), -5)}, "clues must be"),
        ({"clues": torch.zeros(0, 4, dtype=torch.long)}, "clues must be"),
        ({"temperature": 1e-310}, "temperature"),
        ({"order": ["a", "b"]}, "as integers"),
        ({"order": [0.0, 1.0]}, "as integers"),
        ({"order": "blocks:²"}, "blocks:8"),
        ({"clues": torch.zeros(3, 4, dtype=torch.long), "n": 2}, "disagree"),
        ({"order": "sideways"}, "order"),
        ({"order": "blocks"}, "blocks:8"),
        ({"order": [0, 1, 1], "length": 3}, "exactly once"),
        ({"order": [0, 1], "length": 3}, "exactly once"),
        ({"order": 3}, "order must be"),
        ({"order": "blocks:1", "steps": 3}, "at least as many steps"),
        ({"n_loops": 2, "stop": FixedLoops(max_loops=2)}, "not both"),
        ({"seed": -1}, "seed"),
    ],
)
def test_misuse_is_refused_in_one_line(model, arguments, says):
    with pytest.raises(UsageError, match=says) as caught:
        sample(model, **arguments)
    assert "\n" not in str(caught.value)
