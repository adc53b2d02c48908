"""Every arm finds what was planted, in nats: attention written by hand, answers in closed form.

Positions hand on the token that they know; [MASK] and the blank know none. In the planted models position 1 hears
the answer from the clean position 0 in loop 0, and 2 has to get it from 1 later on. 3 is a blank.
"""

import contextlib
import math
import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from loopmdm.analysis.measures import MEASURES, Case
from loopmdm.analysis.measures.interventions import (
    Arm,
    Draw,
    EdgeSet,
    Trial,
    causal,
    causal_effects,
    choice,
    cut,
    mean_values,
    record_values,
    replace_values,
)
from loopmdm.analysis.measures.interventions.causal import KINDS, mean_over_draws, standard_arms
from loopmdm.analysis.measures.interventions.edges import edges
from loopmdm.analysis.measures.interventions.selections import RELATIONS, equal_mass, relation_of
from loopmdm.analysis.measures.interventions.values import donors
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import Sequences
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import TestSet
from tests.conftest import toy_config, toy_model

N_TOKENS, BLANK, GAIN = 12, 10, 20.0  # logits: those of ten answers, the blank, [MASK] (never)
CHOICES = N_TOKENS - 1


class Planted(nn.Module):
    """x + gain * (pattern @ min(x, 1)) with a pattern by position, through the usual hooks; one head."""

    def __init__(self, heard: dict[int, dict[int, float]], n: int, gain: float):
        super().__init__()
        weight = torch.eye(n)
        for query, keys in heard.items():
            weight[query] = 0.0
            for key, share in keys.items():
                weight[query, key] = share
        self.scores, self.gain = (weight + 1e-12).log(), gain

    def forward(self, x, rotary, allowed, tap, held=None):
        v = tap("attn.hook_v", x.clamp(max=1.0)[:, :, None])
        scores = tap("attn.hook_attn_scores", self.scores.expand(len(x), 1, -1, -1))
        pattern = tap("attn.hook_pattern", scores.softmax(-1))
        z = tap("attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        return x + self.gain * z[:, :, 0]


class Plain(nn.Module):
    """No final norm."""

    def forward(self, x, tap=None):
        return x


def planted(heard, n=4, gain=GAIN, d_vocab=N_TOKENS, known=None) -> HookedLoopMDM:
    """One looped layer `Planted`; `known` are the rows of the embedding that are not zero (default: answers)."""
    shape = {"n_prelude_layers": 0, "n_loop_layers": 1, "n_coda_layers": 0, "n_heads": 1, "unembed_bias": False}
    model = LoopMDM(toy_config(d_vocab=d_vocab, n_ctx=n, d_model=d_vocab + d_vocab % 2, **shape)).eval()
    model.blocks[0], model.ln_final = Planted(heard, n, gain), Plain()
    with torch.no_grad():
        model.embed.weight.zero_()
        for token, channel in (known or {t: t for t in range(BLANK)}).items():
            model.embed.weight[token, channel] = 1.0
        model.unembed.weight.copy_(torch.eye(*model.unembed.weight.shape))
    return HookedLoopMDM(model)


def told(n=10) -> Sequences:
    """[a, a, a, blank] with another answer a in each; 1 and 2 may be masked."""
    answer = torch.arange(n)
    tokens = torch.stack([answer, answer, answer, torch.full_like(answer, BLANK)], dim=1)
    return Sequences.of(tokens, torch.tensor([False, True, True, False]))


def loss(logit: float) -> float:
    """Cross-entropy where the true token has this logit and all others 0."""
    return math.log(math.exp(logit) + CHOICES - 1) - logit


GUESS = math.log(CHOICES)
WRONG = loss(GAIN / 2) + GAIN / 2
"""Where another token has logit gain / 2 and the true one 0."""
DIRECT = {1: {0: 0.5, 1: 0.5}, 2: {1: 0.5, 3: 0.5}}
RELAYED = {1: {0: 0.5, 1: 0.5}, 3: {1: 0.5, 3: 0.5}, 2: {3: 0.5, 2: 0.5}}
BOTH = {1: {0: 0.5, 1: 0.5}, 3: {1: 0.5, 3: 0.5}, 2: {1: 0.4, 3: 0.4, 2: 0.2}}


def found(m, sequences, arm: Arm, n_loops=2, **options):
    """Effects at one and at both masked, and the mean."""
    table = causal_effects(m, sequences, [arm], Trial(n_loops, n_bins=2, **options))
    return table[table["kind"] == arm.kind]["effect"].to_numpy()


def approx(*values):
    return pytest.approx(list(values), abs=2e-3)


@pytest.mark.parametrize(("kind", "cost"), [("cut", GUESS - loss(GAIN / 2)), ("resample", WRONG - loss(GAIN / 2))])
def test_edges_that_carry_the_answer_cost_what_it_is_worth(kind, cost):
    """One of two masked positions hears it from the other; with one masked there is no such edge."""
    m = planted(DIRECT)
    assert found(m, told(), Arm(kind, EdgeSet())) == approx(0, cost / 2, cost / 4)
    assert found(m, told(), Arm(kind, EdgeSet("any->masked"))) == approx(0, cost / 2, cost / 4)
    for other in ("clean->masked", "none", "clean->clean"):
        assert (found(m, told(), Arm(kind, EdgeSet(other))) == 0).all()


def test_the_mean_of_others_values_costs_what_their_mixture_does():
    """Nine others in ten draws: each wrong token has logit gain / 2 by how often it was drawn."""
    m, sequences = planted(DIRECT), told()
    expected = []
    shares = np.zeros((10, CHOICES))
    for number in range(10):
        drawn = donors(sequences, 0, 10 + number)  # of the second bin
        shares[np.arange(10), drawn] += 0.1
    for row in range(10):
        logits = torch.tensor(GAIN / 2 * shares[row])
        expected.append(float(logits.logsumexp(0)) - float(logits[row]))
    cost = np.mean(expected) - loss(GAIN / 2)
    assert found(m, sequences, Arm("mean", EdgeSet())) == approx(0, cost / 2, cost / 4)
    assert 0 < cost < WRONG - loss(GAIN / 2)


def test_edges_of_equal_mass_outside_cost_nothing_where_the_answer_goes_within():
    """Half of 2's attention is on 1 (masked), half on 3 (a blank): two sides of equal mass, one edge each."""
    arms = [Arm(kind, EdgeSet(side=side)) for kind in ("cut", "resample") for side in ("within", "outside")]
    table = causal_effects(planted(DIRECT), told(), arms, Trial(2, n_bins=2))
    rows = table[table["mask_ratio"] == 0.75].set_index(["kind", "side"])
    for kind, worth in (("cut", GUESS), ("resample", WRONG)):
        within, outside = (rows.loc[kind, side] for side in ("within", "outside"))
        cost = (worth - loss(GAIN / 2)) / 2
        assert (within["effect"], outside["effect"]) == approx(cost, 0)
        assert within["excess"] == pytest.approx(within["effect"] - outside["effect"])
        assert within["mass"] == pytest.approx(0.25) == outside["mass"]  # 1 has no masked key, and so no mass
        assert np.isnan(outside["excess"])
    assert (rows.loc[[("cut", "within"), ("cut", "outside")], "n_draws"] == 10).all()


def test_a_relay_through_a_clean_position_is_open_until_it_is_cut_too():
    m, cost = planted(RELAYED), GUESS - loss(GAIN / 2)
    assert (found(m, told(), Arm("cut", EdgeSet("masked->masked")), 3) == 0).all()
    for groups in ("clean->masked", "any->masked", "masked->clean"):
        assert found(m, told(), Arm("cut", EdgeSet(groups)), 3)[1] == pytest.approx(cost / 2, abs=2e-3)
    resampled = found(m, told(), Arm("resample", EdgeSet("clean->masked")), 3)
    assert resampled == approx(0, (WRONG - loss(GAIN / 2)) / 2, (WRONG - loss(GAIN / 2)) / 4)


def test_two_ways_carry_what_neither_alone_is_needed_for():
    m = planted(BOTH, gain=40.0)
    alone = [found(m, told(), Arm("cut", EdgeSet(groups)), 3)[1] for groups in ("masked->masked", "clean->masked")]
    assert alone == approx(0, 0)
    assert found(m, told(), Arm("cut", EdgeSet("any->masked")), 3)[1] == pytest.approx(GUESS / 2, abs=2e-3)


def test_values_without_content_are_needed_for_their_mass_alone():
    """[MASK] itself says token 0, which is the answer at 2: a cut costs, another sequence's [MASK] is as good."""
    m = planted({1: {1: 1.0}, 2: {1: 0.5, 3: 0.5}}, gain=2.0, known={N_TOKENS - 1: 0})
    tokens = torch.tensor([[a, 0, 0, BLANK] for a in range(1, 7)])
    sequences = Sequences.of(tokens, torch.tensor([False, True, True, False]))
    assert found(m, sequences, Arm("cut", EdgeSet()))[1] == pytest.approx((loss(2) - loss(3)) / 2, abs=1e-6)
    for kind in ("resample", "mean"):
        assert found(m, sequences, Arm(kind, EdgeSet())) == pytest.approx(0, abs=1e-6)


def test_the_dose_is_the_share_of_the_edges():
    """With one edge that matters, a share of s of all edges holds it in s of the sequences."""
    tokens = told(10).tokens.repeat(60, 1)
    sequences, cost = Sequences.of(tokens, torch.tensor([False, True, True, False])), GUESS - loss(GAIN / 2)
    response = [
        found(planted(DIRECT), sequences, Arm("cut", EdgeSet(share=share)))[1] / (cost / 2)
        for share in (0.25, 0.75, 1.0)
    ]
    for share, seen in zip((0.25, 0.75, 1.0), response, strict=True):
        assert abs(seen - share) <= 3.3 * math.sqrt(share * (1 - share) / 600) + 1e-3


def test_first_loops_stay_intact_and_the_gain_is_told():
    """The edge 1 to 0 matters in loop 0 alone: cut later, it costs nothing. Loops are worth what they bring."""
    table = causal_effects(planted(DIRECT), told(), [Arm("cut", EdgeSet("masked->clean"))], Trial(2, n_bins=2))
    gain, effect = (table[table["kind"] == kind]["effect"].to_numpy() for kind in ("one loop", "cut"))
    # masked alone, 2 hears from the clean 1 in loop 0 as well
    assert gain == approx(0, (GUESS - loss(GAIN / 2)) / 2, (GUESS - loss(GAIN / 2)) / 4)
    assert effect == approx(0, 0, 0)


SIX = BOARDS["sudoku6"]


def test_relations_part_all_pairs_of_cells():
    parts = torch.stack([relation_of(SIX, name) for name in RELATIONS])
    assert torch.equal(parts.sum(0), 1 - torch.eye(36, dtype=torch.long))
    assert dict(zip(RELATIONS, parts[:, 7].sum(-1).tolist(), strict=True)) == {
        "box": 5, "row": 3, "column": 4, "none": 23}  # fmt: skip
    assert all(torch.equal(part, part.T) for part in parts)
    # cell 7 is in row 1, column 1: its box holds 0 1 2 6 7 8
    assert parts[0, 7].nonzero()[:, 0].tolist() == [0, 1, 2, 6, 8]
    assert parts[1, 7].nonzero()[:, 0].tolist() == [9, 10, 11]
    assert parts[2, 7].nonzero()[:, 0].tolist() == [13, 19, 25, 31]


def test_the_relation_that_carries_the_answer_is_found():
    """Cell 9 knows clean cell 11's symbol after loop 0, and tells cell 7 of its row, another box."""
    m = planted({9: {11: 0.5, 9: 0.5}, 7: {9: 0.5, 35: 0.5}}, n=36, d_vocab=7, known={t: t for t in range(6)})
    grids = torch.zeros(6, 36, dtype=torch.long)
    for cell in (7, 9, 11):
        grids[:, cell] = torch.arange(6)
    maskable = torch.zeros(36, dtype=torch.bool)
    maskable[[7, 9]] = True
    sequences = Sequences.of(grids, maskable)
    effects = {name: found(m, sequences, Arm("resample", EdgeSet(relation=name)))[1] for name in RELATIONS}
    whole = found(m, sequences, Arm("resample", EdgeSet()))[1]
    assert effects["row"] == whole > 1
    assert all(abs(effects[name]) < 1e-9 for name in ("box", "column", "none"))


def test_arms_are_the_contexts_that_notebooks_use(hooked, clean):
    """Effects by hand: the same masks through `nelbo` under `cut` from loop 1 on."""
    groups = ("masked->masked", "any->masked")
    table = causal_effects(hooked, clean, [Arm("cut", EdgeSet(g)) for g in groups], Trial(3, n_bins=2))
    with cut(hooked, "none"):
        once, intact = (nelbo(hooked, clean, loops, n_samples=2) for loops in (1, 3))
    whole = table[table["mask_ratio"].isna()].set_index("edges")
    assert whole.loc["none", "effect"] == pytest.approx(once.mean - intact.mean, rel=1e-5)
    for name in groups:
        with cut(hooked, name, loops=slice(1, None)):
            lost = nelbo(hooked, clean, 3, n_samples=2)
        row = whole.loc[name]
        assert row["effect"] == pytest.approx(lost.mean - intact.mean, rel=1e-4)
        _, error, n = stats.mean_and_error((lost.per_sequence - intact.per_sequence).numpy())
        assert (row["effect_se"], row["n"]) == pytest.approx((float(error), int(n)), rel=1e-4)
        assert row["nelbo"] == pytest.approx(intact.mean)


def test_batches_do_not_matter(hooked):
    clean = torch.randint(0, 22, (7, 10), generator=torch.Generator().manual_seed(5))
    arms = [Arm(kind, EdgeSet(side=side, share=0.5)) for kind in ("cut", "resample", "mean") for side in
            ("all", "within", "outside")]  # fmt: skip
    options = Trial(3, n_bins=2, n_draws=3)
    one = causal_effects(hooked, clean, arms, options)
    other = causal_effects(hooked, clean, arms, replace(options, batch_size=3))
    np.testing.assert_allclose(one["effect"], other["effect"], atol=1e-5)
    np.testing.assert_allclose(one["mass"], other["mass"], atol=1e-6)


def test_only_values_that_arms_feed_are_run_and_held(hooked, clean, monkeypatch):
    """Of ten runs for a mean those that are fed one by one stay, and two more; of none the loops left intact."""
    recorded, held = [], []

    def watched(*args):
        values = record_values(*args)
        recorded.append(weakref.ref(next(iter(values.values()))))
        held.append(sum(one() is not None for one in recorded))
        assert {loop for loop, _ in values} == {2, 3}
        return values

    monkeypatch.setattr(causal, "record_values", watched)
    for kinds, runs, most in ((KINDS, 10, 4), (["cut", "resample"], 2, 2), (["mean"], 10, 2), (["cut"], 0, 0)):
        recorded.clear(), held.clear()
        arms = [Arm(kind, EdgeSet()) for kind in kinds]
        causal_effects(hooked, clean, arms, Trial(4, first=2, n_bins=1))
        assert (len(recorded), max(held, default=0)) == (runs, most)


def test_a_running_mean_is_the_mean(hooked, batch):
    runs = [record_values(hooked, batch.tokens.roll(by, 0), 2) for by in range(10)]
    assert all(torch.equal(value, torch.stack([run[place] for run in runs]).mean(0))
               for place, value in mean_values(iter(runs)).items())  # fmt: skip
    assert set(record_values(hooked, batch.tokens, 3, None, slice(1, None))) == {
        (i, k) for i in (1, 2) for k in (1, 2)
    }
    narrow = [{place: value.bfloat16() for place, value in run.items()} for run in runs]
    exact = torch.stack([run[0, 1] for run in narrow]).double().mean(0)
    assert torch.equal(mean_values(narrow)[0, 1], exact.bfloat16())  # summed in float32
    with pytest.raises(UsageError, match="one run at least"):
        mean_values([])


@pytest.mark.parametrize("given", ["ragged", "padded", "one document"])
def test_where_values_cannot_be_swapped_the_remedy_can_be_reached(given, hooked, clean):
    """By the measure's own option, which is what the message names."""
    real = torch.ones_like(clean, dtype=torch.bool)
    real[0, -3:] = False
    sequences = {
        "ragged": Sequences.of(clean, real),
        "padded": Sequences.of(clean, None, real),
        "one document": Sequences.of(clean, clusters=np.zeros(4)),
    }[given]
    item = MEASURES["causal-edges"]
    ask = lambda **own: item.of(Case(hooked, TestSet("own", sequences), item.options.of(item.name, own)))  # noqa: E731
    with pytest.raises(UsageError, match=r'kinds=\["cut"\]'):
        ask()
    table = ask(kinds=["cut"], n_draws=2)
    assert set(table["kind"]) == {"one loop", "cut"} and table["effect"].notna().all()
    for wrong, says in (([], "kinds is empty"), (["cuts"], '"cut"|cut')):
        with pytest.raises(UsageError, match=says):
            ask(kinds=wrong)


def test_values_are_replaced_on_the_chosen_edges_alone(hooked, batch):
    """By hand from pattern and values; own values change nothing."""
    names = lambda n: n.endswith(("hook_pattern", "attn.hook_v", "attn.hook_z"))  # noqa: E731
    _, cache = hooked.run_with_cache(batch.tokens, n_loops=2, names_filter=names, attn_path="eager")
    with cut(hooked, "none"):
        own = record_values(hooked, batch.tokens, 2)
    assert torch.equal(own[1, 2], cache["v", "loop", 1, 2])
    other = {place: value.roll(1, 0) for place, value in own.items()}
    with replace_values(hooked, own):
        kept = hooked(batch.tokens, n_loops=2)
    with cut(hooked, "none"):
        assert torch.equal(kept, hooked(batch.tokens, n_loops=2))
    with replace_values(hooked, other, heads=1):
        _, changed = hooked.run_with_cache(batch.tokens, n_loops=2, names_filter=names, attn_path="eager")
    assert torch.equal(cache["z", "loop", 0, 2], changed["z", "loop", 0, 2])
    pattern = cache["pattern", "loop", 1, 1]
    on = pattern * edges(hooked.model.context(batch.tokens), "masked->masked")[:, None]
    by_hand = torch.einsum("bhqk,bkhd->bqhd", pattern - on, own[1, 1])
    by_hand = by_hand + torch.einsum("bhqk,bkhd->bqhd", on, other[1, 1])
    torch.testing.assert_close(changed["z", "loop", 1, 1][:, :, 1], by_hand[:, :, 1])
    torch.testing.assert_close(changed["z", "loop", 1, 1][:, :, 0], cache["z", "loop", 1, 1][:, :, 0])
    assert torch.equal(mean_values([own, other])[1, 1], (own[1, 1] + other[1, 1]) / 2)


def test_values_are_replaced_whatever_blocks_stand_inside(hooked, batch):
    """What is handed on is what other blocks, inner or outer, made of it; an inner replacement wins."""
    with cut(hooked, "none"):
        own = record_values(hooked, batch.tokens, 1)
    one, two = ({place: v.roll(by, 0) for place, v in own.items()} for by in (1, 2))
    place, layer = slice(0, None), hooked.cfg.layers("loop")[0]
    halve = [(f"loop.0.blocks.{layer}.attn.hook_{leaf}", lambda x, hook: x / 2) for leaf in ("v", "pattern")]

    def z(*blocks):
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block)
            _, cache = hooked.run_with_cache(batch.tokens, 1, names_filter=f"loop.0.blocks.{layer}.attn.hook_z")
        return cache["z", "loop", 0, layer]

    with cut(hooked, "none"):
        _, cache = hooked.run_with_cache(batch.tokens, 1, names_filter=lambda n: n.endswith("pattern"))
    pattern, context = cache["pattern", "loop", 0, layer], hooked.model.context(batch.tokens)
    masked, clean = (edges(context, f"masked->{group}")[:, None] for group in ("masked", "clean"))

    def mixed(pattern, v, *replaced):
        parts = [(pattern * on, values[0, layer]) for on, values in replaced]
        rest = pattern - sum(part for part, _ in parts)
        return sum(torch.einsum("bhqk,bkhd->bqhd", part, values) for part, values in [(rest, v), *parts])

    outer, inner = replace_values(hooked, one, loops=place), hooked.hooks(halve)
    expected = mixed(pattern / 2, own[0, layer] / 2, (masked, one))
    torch.testing.assert_close(z(outer, inner), expected)
    torch.testing.assert_close(z(hooked.hooks(halve), replace_values(hooked, one, loops=place)), expected)
    nested = z(replace_values(hooked, one, "masked->any", place), replace_values(hooked, two, loops=place))
    torch.testing.assert_close(nested, mixed(pattern, own[0, layer], (clean, one), (masked, two)))
    nested = z(replace_values(hooked, two, loops=place), replace_values(hooked, one, "masked->any", place))
    torch.testing.assert_close(nested, mixed(pattern, own[0, layer], (masked | clean, one)))


def test_hidden_masked_keys_are_those_of_the_model_that_forbids_them(model, hooked, batch):
    forbidding = LoopMDM(replace(model.cfg, forbid_masked_keys=("loop",)))
    forbidding.load_state_dict(model.state_dict())
    expected = HookedLoopMDM(forbidding.eval())(batch.tokens, n_loops=3, attn_path="eager")
    with cut(hooked, "any->masked"):
        assert torch.equal(hooked(batch.tokens, n_loops=3), expected)


def test_a_choice_sees_a_pattern_if_it_looks_at_one(batch):
    """Masses are computed for those alone that go by them, in the model's own width; one's own choices do."""
    m, seen = HookedLoopMDM(toy_model().double()), []

    def mine(pattern, context):
        seen.append(pattern)
        return edges(context, "masked->masked")[:, None]

    with cut(m, mine):
        by_mine = m(batch.tokens, n_loops=2)
    with cut(m):
        assert torch.equal(m(batch.tokens, n_loops=2), by_mine)
    assert len(seen) == 4 and all(pattern.dtype == torch.float64 for pattern in seen)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones_like(seen[0].sum(-1)))
    mine.looks, softmax = False, torch.Tensor.softmax

    def softmaxes(what):
        ran = []

        def counted(x, *args, **options):
            ran.append(x)
            return softmax(x, *args, **options)

        with mock.patch.object(torch.Tensor, "softmax", counted), cut(m, what, loops=0, layers=1):
            m(batch.tokens, n_loops=1)
        return len(ran)

    alone = softmaxes("none")
    for what in ("masked->masked", choice(m, EdgeSet(share=0.5)), mine):
        assert softmaxes(what) == alone
    assert softmaxes(choice(m, EdgeSet(side="within"))) == alone + 1


def test_both_sides_carry_the_poorer_ones_mass():
    m = HookedLoopMDM(toy_model(n_ctx=64))
    clean = torch.randint(0, 22, (64, 64), generator=torch.Generator().manual_seed(0))
    tokens = clean.masked_fill(torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.6, 22)
    with cut(m, "none"):
        _, cache = m.run_with_cache(tokens, n_loops=1, names_filter=lambda n: n.endswith("hook_pattern"))
    pattern, context = cache["pattern", "loop", 0, 1], m.model.context(tokens)
    named, rest = (edges(context, f"masked->{group}")[:, None] for group in ("masked", "clean"))
    within, outside = (choice(m, EdgeSet(side=side), Draw(3))(pattern, context) for side in ("within", "outside"))
    assert not (within & ~named).any() and not (outside & ~rest).any()
    wanted = torch.minimum((pattern * named).sum(-1), (pattern * rest).sum(-1))
    for taken in (within, outside):
        assert float((pattern * taken).sum() / wanted.sum()) == pytest.approx(1, abs=0.02)
    poorer = ((pattern * named).sum(-1) < (pattern * rest).sum(-1))[..., None]
    assert torch.equal(within & poorer, named & poorer)  # all of it
    other = choice(m, EdgeSet(side="within"), Draw(3, 1))(pattern, context)
    assert not torch.equal(within, other)
    alone = choice(m, EdgeSet(side="within"), Draw(3, 0, 5))(pattern[5:6], m.model.context(tokens[5:6]))
    assert torch.equal(alone[0], within[5])  # a sequence's edges do not depend on its batch


def test_the_last_edge_is_taken_as_often_as_its_mass_asks():
    """One edge of mass 0.4 against a side of 0.1: taken in a quarter of the draws."""
    pattern = torch.tensor([[0.1, 0.4, 0.5]]).expand(4000, 1, 1, 3).clone()
    pattern = torch.cat([torch.zeros(4000, 1, 2, 3), pattern], dim=2)
    one, other = torch.zeros(2, 4000, 3, 3, dtype=torch.bool)
    one[:, 2, 1] = other[:, 2, 0] = True
    order = torch.rand(4000, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    taken = equal_mass(pattern, one, other, order)[:, 0, 2, 1].double().mean()
    assert float(taken) == pytest.approx(0.25, abs=0.025)
    assert equal_mass(pattern, other, one, order)[:, 0, 2, 0].all()


def test_errors_cover_what_sequences_share_in_a_draw():
    """95% of intervals hold the truth, with noise of sequences, of draws, of both; without the draws', fewer."""
    generator, hits, naive, runs = np.random.default_rng(0), 0, 0, 2000
    for _ in range(runs):
        scales = ((1, 80), 1.0), ((10, 1), 0.3), ((10, 80), 2.0)
        values = 1.0 + sum(generator.normal(0, scale, shape) for shape, scale in scales)
        mean, error, spread, n = mean_over_draws(values, np.ones(80), None)
        assert n == 80 and spread > 0
        hits += abs(mean - 1) <= stats.Z95 * error
        naive += abs(mean - 1) <= stats.Z95 * float(stats.mean_and_error(values.mean(0))[1])
    assert 0.92 <= hits / runs <= 0.97 and naive / runs < 0.90


def test_donors_come_from_other_documents():
    tokens = torch.arange(24).view(6, 4)
    clusters = np.array(["a", "a", "b", "b", "b", "c"])
    for draw in range(20):
        drawn = donors(Sequences.of(tokens, clusters=clusters), 0, draw)
        assert (clusters[drawn] != clusters).all()
    assert len({tuple(donors(Sequences.of(tokens), 0, draw)) for draw in range(20)}) > 15
    with pytest.raises(UsageError, match="two documents"):
        donors(Sequences.of(tokens, clusters=np.zeros(6)), 0, 0)
    uneven = torch.ones(6, 4, dtype=torch.bool)
    uneven[0, 0] = False
    with pytest.raises(UsageError, match='kind "cut"'):
        donors(Sequences.of(tokens, uneven), 0, 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, x: EdgeSet("masked->mask"), "masked->masked"),
        (lambda m, x: EdgeSet(len), "unknown set of edges"),
        (lambda m, x: EdgeSet(None), "unknown set of edges"),
        (lambda m, x: EdgeSet(relation="rows"), "row"),
        (lambda m, x: EdgeSet(side="outsid"), "outside"),
        (lambda m, x: EdgeSet(share=0.0), r"share must be a number above 0 and of at most 1, got 0\.0"),
        (lambda m, x: EdgeSet(share="half"), "above 0 and of at most 1"),
        (lambda m, x: EdgeSet(share=True), "above 0 and of at most 1"),
        (lambda m, x: Arm("resampled", EdgeSet()), "resample"),
        (lambda m, x: Trial(first=0), "first"),
        (lambda m, x: causal_effects(m, x, [Arm("cut", EdgeSet())], Trial(1)), "exceed"),
        (lambda m, x: causal_effects(m, x, [Arm("cut", EdgeSet(relation="row"))], Trial(2)), "fills none"),
        (lambda m, x: cut(m, choice(m, EdgeSet()), matched=True).__enter__(), "outside"),
        (lambda m, x: replace_values(m, {}, "masked").__enter__(), "any->masked"),
        (lambda m, x: replace_values(m, {}, None).__enter__(), "unknown set of edges 'None'; did you mean none"),
        (lambda m, x: replace_values(m, {}, 5).__enter__(), "unknown set of edges '5'; known: none, masked"),
        (lambda m, x: cut(m, None).__enter__(), "unknown set of edges 'None'; did you mean none"),
        (lambda m, x: cut(m, 5).__enter__(), "unknown set of edges '5'; known: none, masked"),
        (lambda m, x: cut(m, 5, matched=True).__enter__(), "unknown set of edges '5'; known: none, masked"),
        (lambda m, x: record_values(m, x, 2, None, slice(2, None)), "none of the chosen loops is among the 2"),
        (lambda m, x: mean_values([{}]), "values"),
        (lambda m, x: mean_values([record_values(m, x, 2), record_values(m, x, 1)]), "same loops"),
        (lambda m, x: mean_values([]), "one run at least"),
    ],
)
def test_misuse_is_named(hooked, clean, call, says):
    with pytest.raises(UsageError, match=says):
        call(hooked, clean)


def test_missing_or_other_values_are_named(hooked, batch):
    with replace_values(hooked, record_values(hooked, batch.tokens, 2)), pytest.raises(UsageError, match="loop 2"):
        hooked(batch.tokens, n_loops=3)
    few = record_values(hooked, batch.tokens[:1], 2)
    with replace_values(hooked, few), pytest.raises(UsageError, match="shape"):
        hooked(batch.tokens, n_loops=2)


def test_the_usual_arms_hold_every_kind_of_every_edge_set(hooked, sudoku_toy):
    filler = HookedLoopMDM(sudoku_toy)
    plain, board = standard_arms(hooked), standard_arms(filler)
    assert {arm.edges.relation for arm in board} - {arm.edges.relation for arm in plain} == set(RELATIONS)
    for m, arms in ((hooked, plain), (filler, board)):
        assert len(arms) == 3 * len({arm.edges for arm in arms}) == len(set(arms))
        for kind in KINDS:
            assert standard_arms(m, [kind]) == [arm for arm in arms if arm.kind == kind]
