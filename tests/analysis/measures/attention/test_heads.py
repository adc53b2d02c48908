"""Planted risers are found; untrained models call at most their level."""

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.attention import effect_tests, head_growth, mask_attention
from loopmdm.analysis.measures.attention.heads import marked_masses, one_sided, random_marks
from loopmdm.analysis.measures.attention.record import log_odds_growth, record
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from tests.conftest import toy_config, toy_model


def sequences(n=16, length=10, seed=4):
    tokens = torch.randint(0, 22, (n, length), generator=torch.Generator().manual_seed(seed))
    return mask_tokens(tokens, 22, mask_ratio=0.5, seed=seed)


def rising(m: HookedLoopMDM, slope: float, if_mark: torch.Tensor | None = None) -> HookedLoopMDM:
    """Head 1 of layer 2 gains `slope` for masked keys at every loop (with `if_mark`: only if they hold [MASK]).

    What the other scores do is damped, so that the plant is the largest growth.
    """
    seen = {}

    def watch(x, hook):
        seen["embedded"] = x

    def plant(scores, hook):
        loop, out, masked = int(hook.name.split(".")[1]), 0.1 * scores, m.context.masked
        if "blocks.1" in hook.name:
            return out
        if if_mark is not None:
            masked = masked & (seen["embedded"] - if_mark).abs().amax(-1).lt(1e-6)
        out[:, 1] += slope * loop * masked[:, None, :]
        return out

    m.add_hook("blocks.0.hook_resid_pre", watch, is_permanent=True)  # after whatever hooks put there
    where = lambda name: name.startswith("loop") and name.endswith("hook_attn_scores")  # noqa: E731
    m.add_hook(where, plant, is_permanent=True)
    return m


def test_growth_is_the_difference_of_the_log_odds(hooked):
    b = sequences()
    mass = record(hooked, b, (0, 2), batch_size=5).mass
    growth, influence = log_odds_growth(mass[..., 1], mass[..., 2])
    frame = mask_attention(hooked, b, n_loops=3)
    frame = frame[(frame["query_group"] == "masked") & (frame["key_group"] == "masked")]
    by = frame[frame["segment"] == "loop"].set_index(["loop", "layer", "head"])["log_odds"]
    for layer in (1, 2):
        for head in (0, 1):
            expected = by[2, layer, head] - by[0, layer, head]
            assert growth[layer - 1, head] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(influence.mean(0), 0, atol=1e-12)


def test_the_planted_head_is_ranked_first_and_confirmed():
    m = rising(HookedLoopMDM(toy_model(seed=3)), slope=1.0)
    frame = head_growth(m, sequences(24), n_loops=3)
    first = frame.iloc[0]
    assert (first["layer"], first["head"], first["rank"]) == (2, 1, 1)
    assert first["p_holm"] < 0.01 and first["growth"] > 1 and first["n"] == 12
    assert frame["growth_ranked"].is_monotonic_decreasing and len(frame) == 4
    assert (frame["p_holm"] >= frame["p_value"]).all()
    one = head_growth(m, sequences(24), n_loops=3, top=1)
    assert len(one) == 1 and one["p_holm"].item() == pytest.approx(one["p_value"].item())


def test_ranking_does_not_see_the_half_that_tests():
    m, b = HookedLoopMDM(toy_model(seed=3)), sequences(24)
    clusters = np.arange(24) // 2
    frame = head_growth(m, b, n_loops=3, clusters=clusters)
    from loopmdm.analysis.measures.attention.sinks import halves

    first = halves(clusters, 0)
    ranks = record(m, b.rows(torch.from_numpy(first)), (0, 2)).mass
    tests = record(m, b.rows(torch.from_numpy(~first)), (0, 2)).mass
    for row in frame.itertuples():
        at = (row.layer - 1, row.head)
        assert row.growth_ranked == pytest.approx(log_odds_growth(ranks[..., 1], ranks[..., 2])[0][at], abs=1e-5)
        assert row.growth == pytest.approx(log_odds_growth(tests[..., 1], tests[..., 2])[0][at], abs=1e-5)


def test_one_sided_by_hand():
    p = one_sided(np.array([0.0, 2.228, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, np.nan]), np.array([11, 11, 11, 1]))
    np.testing.assert_allclose(p[:3], [0.5, 0.025, 1.0], atol=1e-4)
    assert np.isnan(p[3])


def test_untrained_models_call_no_more_than_their_level():
    naive, fair, marks = [], [], []
    for seed in range(40):
        m, b = HookedLoopMDM(toy_model(seed=seed)), sequences(10, 10, seed)
        frame = effect_tests(m, b, n_loops=2, n_marks=19, seed=seed, batch_size=400)
        naive += list(frame["p_sequences"] <= 0.05)
        fair += list(frame["effect"])
        marks += list(frame["p_mark"])
    assert len(fair) == 40 * (4 + 2)
    assert np.mean(fair) <= 0.06
    assert np.mean(naive) > 0.15  # over sequences alone the accident of the draw looks like an effect
    assert 0.45 < np.mean(marks) < 0.6 and 0.15 < np.mean(np.array(marks) <= 0.25) < 0.35


def test_what_hangs_on_the_mask_itself_is_called():
    plain = toy_model(seed=3)
    m = rising(HookedLoopMDM(plain), 1.5, plain.embed.weight[22].detach())
    frame = effect_tests(m, sequences(16), n_loops=3, n_marks=39)
    hit = frame[(frame["layer"] == 2) & (frame["head"] == 1)].iloc[0]
    assert hit["effect"] and hit["p_mark"] == pytest.approx(1 / 40) and hit["growth"] > hit["null_high"]
    # The same rise for whatever sits there is no effect of [MASK], nor is it one to fall.
    anything = effect_tests(rising(HookedLoopMDM(toy_model(seed=3)), 1.5), sequences(16), n_loops=3, n_marks=39)
    row = anything[(anything["layer"] == 2) & (anything["head"] == 1)].iloc[0]
    assert row["p_sequences"] < 0.05 and not row["effect"]
    falls = rising(HookedLoopMDM(plain), -1.5, plain.embed.weight[22].detach())
    frame = effect_tests(falls, sequences(16), n_loops=3, n_marks=39)
    assert not frame[(frame["layer"] == 2) & (frame["head"] == 1)].iloc[0]["effect"]


def test_marks_keep_the_length_and_sit_at_masked_positions_only(hooked):
    b, found = sequences(7), []
    length = hooked.model.embed.weight[22].norm()
    marks = random_marks(hooked, 3, 0)
    for mark in marks:
        torch.testing.assert_close(mark.norm(), length)
    assert not torch.allclose(marks[0], marks[1])
    look = lambda x, hook: found.append(x.clone())  # noqa: E731
    with hooked.hooks([("blocks.0.hook_resid_pre", look)]):
        each = marked_masses(hooked, b, 2, marks, batch_size=4)  # parts that go over marks
    embedded = torch.cat(found).unflatten(0, (3, 7))
    for mark, one in zip(marks, embedded, strict=True):
        torch.testing.assert_close(one[b.masked], mark.expand(int(b.masked.sum()), -1))
        torch.testing.assert_close(one[~b.masked], hooked.model.embed(b.tokens[~b.masked]))
    np.testing.assert_allclose(each[1], marked_masses(hooked, b, 2, marks[1:2], 7)[0], atol=1e-6)
    own = hooked.model.embed.weight[22:23]  # [MASK]'s own vector is a mark that changes nothing
    np.testing.assert_allclose(marked_masses(hooked, b, 2, own, 3)[0], record(hooked, b, (0, 1)).mass, atol=1e-6)


def test_parts_change_nothing_and_single_sequences_have_no_p(hooked):
    b = sequences(9)
    whole = effect_tests(hooked, b, n_marks=19)
    pd.testing.assert_frame_equal(effect_tests(hooked, b, n_marks=19, batch_size=4), whole, atol=1e-4)
    alone = effect_tests(hooked, b.rows(slice(0, 1)), n_marks=19)
    assert alone["p_value"].isna().all() and not alone["effect"].any() and (alone["n"] == 1).all()
    clustered = effect_tests(hooked, b, n_marks=19, clusters=np.zeros(9))
    assert clustered["p_sequences"].isna().all()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_group_without_members_is_nan(hooked, clean, ratio):
    b = mask_tokens(clean, 22, mask_ratio=ratio)
    frame = effect_tests(hooked, b, n_marks=19)
    assert frame[["growth", "p_value"]].isna().all(axis=None) and not frame["effect"].any()
    assert (frame["n"] == 0).all()
    assert head_growth(hooked, b)["p_holm"].isna().all()


def test_misuse_is_refused(hooked, batch):
    for measure in (head_growth, effect_tests):
        with pytest.raises(UsageError, match="at least 2"):
            measure(hooked, batch, n_loops=1)
        with pytest.raises(UsageError, match="no looped layers"):
            measure(HookedLoopMDM(toy_config(n_loop_layers=0)), batch)
        with pytest.raises(UsageError, match="MaskedBatch"):
            measure(hooked, batch.tokens)
    with pytest.raises(UsageError, match="cannot reach level"):
        effect_tests(hooked, batch, n_marks=10)
    with pytest.raises(UsageError, match="two halves"):
        head_growth(hooked, batch.rows(slice(0, 1)))
