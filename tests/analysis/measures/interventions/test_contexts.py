"""Interventions do what they say, nothing else, and their estimates recover planted effects."""

import dataclasses

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.interventions import (
    cut,
    damp,
    effect_by_loop,
    freeze,
    mediated_share,
    patch,
    run_layers,
    skip,
    stale,
)
from loopmdm.analysis.measures.interventions.edges import edges, matched_edges
from loopmdm.analysis.measures.interventions.effects import share_of_gain
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import nelbo
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.stopping.rules import StateDelta
from tests.conftest import toy_config, toy_model


def eager(m, tokens, n_loops=3):
    return m(tokens, n_loops=n_loops, attn_path="eager")


def test_cutting_nothing_changes_nothing_bit_for_bit(hooked, batch):
    before, fused = eager(hooked, batch.tokens), hooked(batch.tokens, n_loops=3)
    with cut(hooked, "none"):
        assert torch.equal(hooked(batch.tokens, n_loops=3), before)
    with cut(hooked):
        assert not torch.equal(hooked(batch.tokens, n_loops=3), before)
    assert torch.equal(eager(hooked, batch.tokens), before)  # and leaves nothing behind
    assert torch.equal(hooked(batch.tokens, n_loops=3), fused)


def test_cutting_all_masked_edges_is_the_model_that_forbids_them(model, hooked, batch):
    forbidding = LoopMDM(dataclasses.replace(model.cfg, forbid_mask_to_mask=("loop",)))
    forbidding.load_state_dict(model.state_dict())
    expected = eager(HookedLoopMDM(forbidding.eval()), batch.tokens)
    with cut(hooked, "masked->masked"):
        assert torch.equal(hooked(batch.tokens, n_loops=3), expected)
        assert not torch.equal(expected, eager(HookedLoopMDM(model), batch.tokens))


def test_a_cut_removes_its_edges_renormalises_and_spares_the_rest(hooked, batch):
    name = "attn.hook_pattern"
    _, before = hooked.run_with_cache(batch.tokens, n_loops=3, names_filter=lambda n: n.endswith(name))
    with cut(hooked, "masked->clean", loops=1, layers=1, heads=0):
        _, after = hooked.run_with_cache(batch.tokens, n_loops=3, names_filter=lambda n: n.endswith(name))
    for key in ("loop.0.blocks.1.attn.hook_pattern", "loop.0.blocks.2.attn.hook_pattern", "blocks.0." + name):
        assert torch.equal(before[key], after[key])
    old, new = (cache["loop.1.blocks.1.attn.hook_pattern"] for cache in (before, after))
    assert torch.equal(old[:, 1], new[:, 1])
    gone = batch.masked[:, :, None] & ~batch.masked[:, None, :]
    kept = old[:, 0].masked_fill(gone, 0.0)
    torch.testing.assert_close(new[:, 0], kept / kept.sum(-1, keepdim=True))


def test_three_tokens_by_hand(hooked):
    tokens = torch.tensor([[22, 5, 22]])
    context = hooked.model.context(tokens)
    assert edges(context, "masked->masked")[0].tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert edges(context, "masked->clean")[0].tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert edges(context, "clean->masked")[0].tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert not edges(context, "clean->clean").any() and not edges(context, "none").any()


def test_random_edges_carry_the_same_mass_at_the_same_distances():
    m = HookedLoopMDM(toy_model(n_ctx=64))
    clean = torch.randint(0, 22, (8, 64), generator=torch.Generator().manual_seed(0))
    tokens = clean.masked_fill(torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) < 0.5, 22)
    with cut(m, "none"):
        _, cache = m.run_with_cache(tokens, n_loops=1, names_filter=lambda n: n.endswith("hook_pattern"))
    pattern, context = cache["pattern", "loop", 0, 1], m.model.context(tokens)
    taken = matched_edges(pattern, context, "masked->masked", seed=3, step=0)
    named = edges(context, "masked->masked")[:, None].expand_as(taken)
    masked = tokens == 22
    assert not taken.diagonal(dim1=-2, dim2=-1).any() and not taken[:, :, :, :].transpose(1, 2)[~masked].any()
    assert 0.2 < (taken & named).sum() / taken.sum() < 0.8  # of either group
    place = torch.arange(64)
    bins = (place[:, None] - place[None]).abs().clamp(min=1).log2().floor()
    largest = pattern.masked_fill(torch.eye(64, dtype=torch.bool), 0).amax(-1)
    for number in range(6):
        here = bins == number
        wanted, found = ((pattern * (mask & here)).sum(-1) for mask in (named, taken))
        assert ((wanted - found).abs() <= largest + 1e-6)[:, :, :].transpose(1, 2)[masked].all()
        queries = masked[:, None].expand(8, 2, 64)
        assert float(found[queries].mean()) == pytest.approx(float(wanted[queries].mean()), rel=0.1)
    again = matched_edges(pattern, context, "masked->masked", seed=3, step=0)
    other = matched_edges(pattern, context, "masked->masked", seed=4, step=0)
    assert torch.equal(taken, again) and not torch.equal(taken, other)


def test_matched_cuts_leave_clean_queries_and_their_patterns_alone(hooked, batch):
    with cut(hooked, "masked->masked", loops=0, layers=1, matched=True):
        _, after = hooked.run_with_cache(
            batch.tokens, n_loops=1, names_filter=lambda n: n.endswith("hook_pattern")
        )
    _, before = hooked.run_with_cache(batch.tokens, n_loops=1, names_filter=lambda n: n.endswith("hook_pattern"))
    old, new = (cache["pattern", "loop", 0, 1].transpose(1, 2) for cache in (before, after))
    assert torch.equal(old[~batch.masked], new[~batch.masked]) and not torch.equal(old, new)
    torch.testing.assert_close(new.sum(-1), torch.ones_like(new.sum(-1)))


def some_stop(hooked, batch) -> StateDelta:
    """A rule that stops some sequences after two loops, and not all."""
    record = hooked.run(batch.tokens, stop=StateDelta(0.0, max_loops=2)).criterion[1].sort().values
    return StateDelta(float(record[:2].mean()), max_loops=6)


def test_cuts_follow_sequences_that_stop(hooked, batch):
    with cut(hooked, "masked->masked"):
        rule = some_stop(hooked, batch)
    with cut(hooked, "masked->masked"):
        together = hooked.run(batch.tokens, stop=rule, attn_path="eager")
        alone = torch.cat([hooked.run(row[None], stop=rule, attn_path="eager").logits for row in batch.tokens])
    assert len(set(together.loops_used.tolist())) > 1
    torch.testing.assert_close(together.logits, alone, atol=1e-5, rtol=1e-5)


def test_stale_values_are_those_of_loop_0_at_one_group(hooked, batch):
    first = {}

    def by_hand(value, hook):
        layer = hook.name.split(".")[-3]
        if hook.name.startswith("loop.0."):
            first[layer] = value
            return value
        mixed = value.clone()
        mixed[batch.masked] = first[layer][batch.masked]
        return mixed

    name = lambda n: n.startswith("loop") and n.endswith("attn.hook_v")  # noqa: E731
    expected = hooked.run_with_hooks(batch.tokens, n_loops=3, fwd_hooks=[(name, by_hand)])
    with stale(hooked, "masked"):
        assert torch.equal(hooked(batch.tokens, n_loops=3), expected)
        torch.testing.assert_close(hooked(batch.tokens, n_loops=1), hooked.model(batch.tokens, n_loops=1))
    with stale(hooked, "masked", loops=0):
        torch.testing.assert_close(hooked(batch.tokens, n_loops=3), hooked.model(batch.tokens, n_loops=3))
    with stale(hooked), pytest.raises(UsageError, match="n_loops, not a stopping rule"):
        hooked.run(batch.tokens, stop=some_stop(hooked, batch))
    with pytest.raises(UsageError, match="loop 0"), stale(hooked, layers=0):
        pass


def test_frozen_groups_keep_their_states(hooked, batch):
    with freeze(hooked, "clean"):
        _, cache = hooked.run_with_cache(batch.tokens, n_loops=3)
    start, end = cache["loop.0.hook_in"], cache["loop.2.hook_out"]
    assert torch.equal(start[~batch.masked], end[~batch.masked])
    assert not torch.isclose(start[batch.masked], end[batch.masked]).all()
    with freeze(hooked, "clean", loops=slice(1, None)), freeze(hooked, "masked", loops=slice(1, None)):
        torch.testing.assert_close(hooked(batch.tokens, n_loops=3), hooked(batch.tokens, n_loops=1))


def test_a_damped_loop_takes_a_part_of_its_step(hooked, batch):
    with damp(hooked, 1.0):
        torch.testing.assert_close(hooked(batch.tokens, n_loops=3), hooked.model(batch.tokens, n_loops=3))
    _, cache = hooked.run_with_cache(batch.tokens, n_loops=1)
    start, full = cache["loop.0.hook_in"], cache["loop.0.hook_out"]
    with damp(hooked, 0.25):
        _, cache = hooked.run_with_cache(batch.tokens, n_loops=1)
    torch.testing.assert_close(cache["loop.0.hook_out"], start + 0.25 * (full - start))


def test_patching_a_runs_own_state_changes_nothing_and_anothers_takes_over(hooked, batch):
    ends = lambda name: name.endswith(("hook_in", "hook_out"))  # noqa: E731 - patterns would be explicit attention
    _, cache = hooked.run_with_cache(batch.tokens, n_loops=3, names_filter=ends)
    with patch(hooked, 1, cache["loop.1.hook_out"]):
        torch.testing.assert_close(hooked(batch.tokens, n_loops=3), hooked.model(batch.tokens, n_loops=3))
    other = batch.tokens.roll(1, 0)
    with patch(hooked, 1, cache["loop.1.hook_out"]):
        torch.testing.assert_close(hooked(other, n_loops=3), hooked.model(batch.tokens, n_loops=3))
    rows = batch.masked
    with patch(hooked, 0, torch.zeros_like(cache["loop.0.hook_out"]), rows):
        _, patched = hooked.run_with_cache(batch.tokens, n_loops=2, names_filter=ends)
    assert not patched["loop.1.hook_in"][rows].any()
    assert torch.equal(patched["loop.1.hook_in"][~rows], cache["loop.1.hook_in"][~rows])
    with patch(hooked, 1, torch.zeros(1, 2, 3)), pytest.raises(UsageError, match="shape"):
        hooked(batch.tokens, n_loops=3)


def test_skipped_layers_and_other_orders(model, hooked, batch):
    one, three = model(batch.tokens, n_loops=1), model(batch.tokens, n_loops=3)
    torch.testing.assert_close(run_layers(model, batch.tokens, [0, 1, 2, 3]), one)
    torch.testing.assert_close(run_layers(model, batch.tokens, [0, 1, 2, 1, 2, 1, 2, 3]), three)
    with skip(hooked, loops=slice(1, None)):  # a whole loop left out is one loop less
        torch.testing.assert_close(hooked(batch.tokens, n_loops=3), one)
    with skip(hooked, layers=2, loops=0):
        torch.testing.assert_close(
            hooked(batch.tokens, n_loops=2), run_layers(model, batch.tokens, [0, 1, 1, 2, 3])
        )
    with skip(hooked, layers=3):
        torch.testing.assert_close(hooked(batch.tokens, n_loops=1), run_layers(model, batch.tokens, [0, 1, 2]))


def test_any_stack_can_be_looped_without_training(model, batch):
    other = model.looping(0, 2)
    assert (other.cfg.n_coda_layers, other.cfg.max_loops) == (2, 1)
    torch.testing.assert_close(other(batch.tokens, n_loops=1), model(batch.tokens, n_loops=1))
    torch.testing.assert_close(
        other(batch.tokens, n_loops=3), run_layers(model, batch.tokens, [0, 1, 0, 1, 0, 1, 2, 3])
    )
    assert other.embed.weight.data_ptr() == model.embed.weight.data_ptr()
    with pytest.raises(UsageError, match="do not fit"):
        model.looping(3, 2)


def test_where_edges_cannot_be_cut_nothing_is_mediated(clean):
    m = HookedLoopMDM(LoopMDM(toy_config(forbid_mask_to_mask=("loop",))).eval())
    table = mediated_share(m, clean, n_loops=2, arms=[("masked->masked", False), ("masked->clean", False)])
    first, second = table["gain"] - table["gain_intact"]
    assert first == 0 and second != 0 and table["n"].tolist() == [4, 4]


def test_the_stale_arm_is_stale_on_the_explicit_path(hooked, clean):
    row = mediated_share(hooked, clean, n_loops=3, arms=[("stale", False), ("none", False)])
    with cut(hooked, "none"):
        one, intact = (nelbo(hooked, clean, s, n_samples=2).mean for s in (1, 3))
        with stale(hooked, "masked"):
            kept = nelbo(hooked, clean, 3, n_samples=2).mean
    assert row["gain"].tolist() == pytest.approx([one - kept, one - intact])
    assert kept != pytest.approx(intact)


def test_a_planted_share_is_recovered_and_covered():
    generator, hits, runs = np.random.default_rng(0), 0, 4000
    for _ in range(runs):
        intact = generator.normal(1.0, 1.0, 100)
        kept = 0.6 * intact + generator.normal(0, 0.3, 100)
        share, error = share_of_gain(intact, kept, np.ones(100))
        hits += abs(share - 0.4) <= stats.t95(100) * error
    assert 0.93 <= hits / runs <= 0.97
    assert np.isnan(share_of_gain(-intact, kept, np.ones(100))).all()  # no gain: nothing to mediate
    share, error = share_of_gain(intact, 0.25 * intact, np.ones(100))
    assert share == pytest.approx(0.75) and error == pytest.approx(0, abs=1e-12)


def test_effects_by_loop_are_differences_of_nelbos(hooked, clean):
    options = {"n_loops": 3, "n_bins": 1, "n_samples": 2}
    table = effect_by_loop(hooked, clean, lambda loops: cut(hooked, "masked->masked", loops), **options)
    with cut(hooked, "none"):
        before = nelbo(hooked, clean, 3, n_samples=2)
    with cut(hooked, "masked->masked", loops=1):
        after = nelbo(hooked, clean, 3, n_samples=2)
    row = table[table["loop"] == 1].iloc[0]
    assert row["nelbo"] == pytest.approx(before.mean) and row["n"] == 4
    assert row["effect"] == pytest.approx(after.mean - before.mean)
    onward = effect_by_loop(hooked, clean, lambda loops: cut(hooked, "none", loops), onward=True, **options)
    assert (onward["effect"] == 0).all() and onward["onward"].all()
    binned = effect_by_loop(
        hooked, clean, lambda loops: cut(hooked, loops=loops), n_loops=1, n_bins=30, n_samples=1
    )
    assert binned["effect"].isna().sum() == 30 - binned["n"].gt(0).sum() and binned["n"].sum() == 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: cut(m, "masked-masked"), "masked->masked"),
        (lambda m: cut(m, layers=9), "0..3"),
        (lambda m: cut(m, heads=[2]), "0..1"),
        (lambda m: cut(m, layers=[]), "at least one"),
        (lambda m: cut(m, loops=-1), "loops"),
        (lambda m: cut(m, loops=[]), "loops is empty"),
        (lambda m: cut(m, loops=slice(-2, None)), "from the front"),
        (lambda m: freeze(m, "all"), "masked"),
        (lambda m: damp(m, 0.0), "strength must be a number above 0, got 0.0"),
        (lambda m: damp(m, True), "above 0"),
        (lambda m: damp(m, float("nan")), "above 0"),
        (lambda m: damp(m, float("inf")), "above 0"),
        (lambda m: damp(m, "half"), "above 0"),
        (lambda m: patch(m, -1, torch.zeros(1)), "loop"),
    ],
)
def test_wrong_places_are_named(hooked, call, says):
    with pytest.raises(UsageError, match=says), call(hooked):
        pass


def test_a_gain_needs_two_loops(hooked, clean):
    with pytest.raises(UsageError, match="at least 2"):
        mediated_share(hooked, clean, n_loops=1)
