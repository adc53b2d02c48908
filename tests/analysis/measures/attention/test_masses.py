"""Masses sum to 1, equal a naive loop over queries, and recover planted truths."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.attention import LOG_ODDS_CAP, AttentionSums, mask_attention
from loopmdm.analysis.watch.groups import MASKED_OR_CLEAN, Place, Seen, States, group_chances, group_masses
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.sequences import MaskedBatch
from tests.conftest import toy_config


def rows(frame: pd.DataFrame, query: str, key: str) -> pd.DataFrame:
    return frame[(frame["query_group"] == query) & (frame["key_group"] == key)]


def naive(m, b, n_loops):
    """Dictionary (name, head, query group, key group) -> (mass, chance, content), by explicit loops."""
    _, cache = m.run_with_cache(b.tokens, n_loops=n_loops, attention_mask=b.attention_mask)
    real = torch.ones_like(b.masked) if b.attention_mask is None else b.attention_mask != 0
    found = {}
    for name in [n for n in cache if n.endswith("hook_pattern")]:
        layer = int(name.split("blocks.")[1].split(".")[0])
        weight = m.model.blocks[layer].attn.out.weight
        values = cache[name.replace("pattern", "v")]
        for head in range(m.cfg.n_heads):
            w = weight[:, head * m.cfg.d_head : (head + 1) * m.cfg.d_head]
            for query in ("masked", "clean"):
                for key in ("self", "masked", "clean"):
                    per_sequence = [
                        _one(cache[name][i, head], values[i, :, head] @ w.T, b.masked[i], real[i], query, key)
                        for i in range(len(b))
                    ]
                    kept = [x for x in per_sequence if x is not None]
                    found[name, head, query, key] = np.mean(kept, axis=0) if kept else None
    return found


def _one(pattern, moved, masked, real, query, key):
    """Mean over queries of (mass, chance share, content norm) in one sequence; None without queries."""
    state = {"masked": masked & real, "clean": ~masked & real}
    out = []
    for q in state[query].nonzero()[:, 0].tolist():
        keys = [q] if key == "self" else [k for k in state[key].nonzero()[:, 0].tolist() if k != q]
        weights = pattern[q, keys]
        mean = moved[keys].mean(0) if keys else torch.zeros(moved.shape[1])
        content = (weights[:, None] * (moved[keys] - mean)).sum(0).norm()
        out.append((float(weights.sum()), len(keys) / int(real.sum()), float(content)))
    return np.mean(out, axis=0) if out else None


@pytest.mark.parametrize("padded", [False, True])
def test_masses_and_content_equal_the_naive_loop(hooked, clean, padded):
    mask = None
    if padded:
        mask = torch.ones_like(clean)
        mask[0, 6:] = 0
    b = mask_tokens(clean, 22, t=0.5, seed=2, attention_mask=mask)
    frame = mask_attention(hooked, b, n_loops=2, batch_size=3)
    expected = naive(hooked, b, 2)
    assert len(frame) == len(expected) == (2 + 2 * 2) * 2 * 2 * 3
    for row in frame.itertuples():
        name = f"blocks.{row.layer}.attn.hook_pattern"
        name = name if pd.isna(row.loop) else f"loop.{row.loop}.{name}"
        mass, chance, content = expected[name, row.head, row.query_group, row.key_group]
        assert row.mass == pytest.approx(mass, abs=1e-5)
        assert row.chance == pytest.approx(chance, abs=1e-6)
        assert row.lift == pytest.approx(mass / chance, abs=1e-4)
        assert row.content == pytest.approx(content, abs=1e-4)


def test_masses_sum_to_one_over_key_groups(hooked, batch):
    frame = mask_attention(hooked, batch, n_loops=3)
    sums = frame.groupby(["depth", "head", "query_group"])["mass"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_three_by_three_by_hand():
    # One head; keys 0 and 1 masked, key 2 clean.
    pattern = torch.tensor([[[[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.25, 0.25, 0.5]]]])
    states = States(torch.tensor([[True, True, False]]), torch.ones(1, 3).bool())
    seen = Seen.of(Place("loop.0.blocks.1.", 1, 0, states), pattern)
    keys = MASKED_OR_CLEAN.members(seen)
    torch.testing.assert_close(group_masses(seen, keys)[0, 0], torch.tensor([[0.6, 0.2, 0.2], [0.5, 0.5, 0.0]]))
    torch.testing.assert_close(group_chances(states, keys)[0, 0], torch.tensor([[1, 1, 1], [1, 2, 0]]) / 3)


def planted(bias_of_masked_keys: float) -> HookedLoopMDM:
    """A model whose scores are 0 for clean keys and `bias` for masked ones (planted by a hook)."""
    m = HookedLoopMDM(toy_config())

    def plant(scores, hook):
        masked = planted_batch().tokens == 22
        return torch.zeros_like(scores) + bias_of_masked_keys * masked[:, None, None, :]

    m.add_hook(lambda name: name.endswith("hook_attn_scores"), plant, is_permanent=True)
    return m


def planted_batch() -> MaskedBatch:
    tokens = torch.randint(0, 22, (3, 12), generator=torch.Generator().manual_seed(4))
    return mask_tokens(tokens, 22, mask_ratio=0.5, seed=1)


@pytest.mark.parametrize("bias", [0.0, 1.3, -0.7])
def test_planted_log_odds_are_recovered(bias):
    frame = mask_attention(planted(bias), planted_batch(), n_loops=2)
    own = frame["key_group"] == "masked"
    np.testing.assert_allclose(frame.loc[own, "log_odds"], bias, atol=1e-5)
    if bias == 0:
        np.testing.assert_allclose(frame["lift"], 1, atol=1e-5)


def test_log_odds_stand_once_a_query_group(hooked, batch):
    for by_head in (True, False):
        frame = mask_attention(hooked, batch, n_loops=2, by_head=by_head)
        own = frame["key_group"] == "masked"
        for name in ("log_odds", "log_odds_se", "log_odds_capped"):
            assert frame.loc[own, name].notna().all() and frame.loc[~own, name].isna().all()
        keys = [name for name in ("segment", "loop", "layer", "head", "query_group") if name in frame]
        assert (frame.groupby(keys, dropna=False)["log_odds"].count() == 1).all()


def test_attending_to_masked_keys_only_caps_the_lift():
    frame = mask_attention(planted(60.0), planted_batch(), n_loops=1)
    m_to_m = rows(frame, "masked", "masked")
    # 6 of 12 masked: a masked query spreads over itself and 5 others, of 12 keys.
    np.testing.assert_allclose(m_to_m["mass"], 5 / 6, atol=1e-5)
    np.testing.assert_allclose(m_to_m["lift"], 12 / 6, atol=1e-5)
    np.testing.assert_allclose(m_to_m["mass_with_self"], 1, atol=1e-5)
    np.testing.assert_allclose(rows(frame, "clean", "masked")["lift"], 2, atol=1e-5)


def test_a_head_that_sees_equal_values_moves_no_content(hooked, batch):
    frame = mask_attention(hooked, batch, n_loops=1)
    first = rows(frame, "masked", "masked").query("layer == 0")
    assert (first["mass"] > 0.1).any()
    np.testing.assert_allclose(first["content"], 0, atol=1e-5)  # all [MASK] embeddings are the same
    assert (rows(frame, "masked", "clean").query("layer == 0")["content"] > 0.01).all()


def test_empty_groups_are_nan_with_n_zero(hooked, clean):
    masked = mask_attention(hooked, mask_tokens(clean, 22, mask_ratio=1.0), n_loops=1)
    empty = masked[(masked["query_group"] == "clean") | (masked["key_group"] == "clean")]
    assert (empty["n"] == 0).all() and empty[["mass", "lift", "content"]].isna().all(axis=None)
    assert masked["log_odds"].isna().all()
    assert (rows(masked, "masked", "masked")["n"] == 4).all()
    nothing = mask_attention(hooked, mask_tokens(clean, 22, mask_ratio=0.0), n_loops=1)
    assert (rows(nothing, "masked", "masked")["n"] == 0).all()
    assert (rows(nothing, "clean", "clean")["n"] == 4).all()


def test_places_of_all_applications_are_right(hooked, batch):
    frame = mask_attention(hooked, batch, n_loops=3).drop_duplicates("depth").sort_values("depth")
    assert frame["segment"].tolist() == ["prelude"] + ["loop"] * 6 + ["coda"]
    assert frame["layer"].tolist() == [0, 1, 2, 1, 2, 1, 2, 3]
    assert frame["loop"].tolist() == [pd.NA, 0, 0, 1, 1, 2, 2, pd.NA]
    assert (frame["mask_ratio"] == 0.5).all() and (frame["n_loops"] == 3).all()


def test_pooling_heads_averages_masses(hooked, batch):
    by_head = mask_attention(hooked, batch, n_loops=2)
    pooled = mask_attention(hooked, batch, n_loops=2, by_head=False)
    keys = ["depth", "query_group", "key_group"]
    expected = by_head.groupby(keys)[["mass", "content"]].mean()
    got = pooled.set_index(keys)[["mass", "content"]].sort_index()
    pd.testing.assert_frame_equal(got, expected.sort_index(), check_exact=False, atol=1e-6)
    assert pooled["head"].isna().all()


def test_user_hooks_are_in_force_while_measuring(hooked, batch):
    with hooked.hooks([("loop.1.blocks.1.attn.hook_pattern", lambda x, hook: x * 0 + torch.eye(10))]):
        frame = mask_attention(hooked, batch, n_loops=2)
    part = frame[(frame["depth"] == 3) & (frame["key_group"] == "self")]
    np.testing.assert_allclose(part["mass"], 1)


def test_misuse_is_refused(hooked, batch):
    with pytest.raises(UsageError, match="MaskedBatch"):
        mask_attention(hooked, batch.tokens)
    with pytest.raises(UsageError, match="n_loops"):
        mask_attention(hooked, batch, n_loops=0)
    assert math.isnan(mask_attention(hooked, batch.rows(slice(0, 1)), n_loops=1)["mass_se"].iloc[0])


PLACE = ["depth", "head", "query_group", "key_group"]


@pytest.mark.parametrize("clusters", [None, np.array([0, 0, 1, 2, 2, 1, 3, 0])])
def test_shards_add_up_to_the_whole_with_their_errors(hooked, clusters):
    tokens = torch.randint(0, 22, (8, 10), generator=torch.Generator().manual_seed(5))
    b = mask_tokens(tokens, 22, t=0.4, seed=3)
    whole = mask_attention(hooked, b, n_loops=2, clusters=clusters)
    parts = []
    for span in (slice(0, 3), slice(3, 4), slice(4, 8)):  # clusters 0, 1 and 2 go over shards
        labels = None if clusters is None else clusters[span]
        parts.append(AttentionSums(hooked, 2).add(b.rows(span), labels))
    merged = parts[2].merge(parts[0]).merge(parts[1]).frame()
    pd.testing.assert_frame_equal(
        merged.sort_values(PLACE, ignore_index=True),
        whole.sort_values(PLACE, ignore_index=True),
        atol=1e-6,
        rtol=0,
    )
    assert whole["mass_se"].notna().any()


def test_errors_are_those_of_the_sequences_means(hooked):
    from loopmdm.analysis.numbers import stats

    tokens = torch.randint(0, 22, (9, 10), generator=torch.Generator().manual_seed(6))
    b, clusters = mask_tokens(tokens, 22, t=0.5, seed=3), np.arange(9) // 2
    each = [mask_attention(hooked, b.rows(slice(i, i + 1)), n_loops=1) for i in range(9)]
    mass, chance = (np.stack([frame[name].fillna(0) for frame in each]) for name in ("mass", "chance"))
    for labels in (None, clusters):
        whole = mask_attention(hooked, b, n_loops=1, clusters=labels, batch_size=4)
        np.testing.assert_allclose(whole["mass_se"], stats.mean_and_error(mass, labels)[1], rtol=1e-5)
        masked, clean = whole["key_group"] == "masked", whole["key_group"] == "clean"
        parts = (mass[:, masked], 1), (chance[:, masked], -1), (mass[:, clean], -1), (chance[:, clean], 1)
        value, influence = stats.log_ratio(parts)
        np.testing.assert_allclose(whole.loc[masked, "log_odds"], value, rtol=1e-5)
        error = stats.influence_error(influence, labels)
        np.testing.assert_allclose(
            whole.loc[masked, "log_odds_se"], np.where(np.isnan(value), value, error), rtol=1e-4
        )


def attends(to_self: bool) -> HookedLoopMDM:
    """A model that attends to masked keys only, evenly; with or without its own."""
    m = HookedLoopMDM(toy_config())

    def plant(scores, hook):
        masked = (planted_batch().tokens == 22)[:, None, None, :].expand_as(scores)
        own = torch.eye(scores.shape[-1], dtype=torch.bool)
        return torch.zeros_like(scores).masked_fill(~masked | (own & (not to_self)), float("-inf"))

    m.add_hook(lambda name: name.endswith("hook_attn_scores"), plant, is_permanent=True)
    return m


def test_attending_to_masked_keys_alone_has_the_largest_lift_and_the_log_odds_cap():
    t, masked = 12, 6
    frame = mask_attention(attends(to_self=True), planted_batch(), n_loops=2)
    m_to_m = rows(frame, "masked", "masked")
    np.testing.assert_allclose(m_to_m["lift_with_self"], t / masked, rtol=1e-5)
    frame = mask_attention(attends(to_self=False), planted_batch(), n_loops=2)
    np.testing.assert_allclose(rows(frame, "masked", "masked")["lift"], t / (masked - 1), rtol=1e-5)
    np.testing.assert_allclose(rows(frame, "clean", "masked")["log_odds_capped"], LOG_ODDS_CAP)
    np.testing.assert_allclose(rows(frame, "masked", "masked")["log_odds_capped"], LOG_ODDS_CAP)
    assert frame["log_odds"].isna().all()  # a mass vanishes: no silent number
    assert pytest.approx(math.log(1e6)) == LOG_ODDS_CAP


def test_capped_log_odds_agree_below_the_cap_and_need_both_groups(hooked, clean, batch):
    frame = mask_attention(hooked, batch, n_loops=1)
    np.testing.assert_allclose(frame["log_odds_capped"], frame["log_odds"])
    capped = mask_attention(planted(-60.0), planted_batch())["log_odds_capped"].dropna()
    assert (capped == -LOG_ODDS_CAP).all() and len(capped) > 0
    assert mask_attention(hooked, mask_tokens(clean, 22, mask_ratio=1.0))["log_odds_capped"].isna().all()


def test_a_batch_size_changes_nothing_and_sums_stay_small(hooked, clean):
    b = mask_tokens(clean, 22, t=0.5, seed=8)
    pd.testing.assert_frame_equal(mask_attention(hooked, b, batch_size=1), mask_attention(hooked, b), atol=1e-6)
    sums = AttentionSums(hooked, 3)
    sizes = []
    for _ in range(3):
        sums.add(b)
        sizes.append(sum(part._products.nbytes + part._mean.nbytes for part in sums.moments.values()))
    assert sizes[0] == sizes[-1]  # flat in the number of sequences
    assert int(sums.frame()["n"].max()) == 12


def test_shards_of_different_measures_are_refused(hooked, batch):
    ours = AttentionSums(hooked, 2).add(batch)
    with pytest.raises(UsageError, match="n_loops"):
        ours.merge(AttentionSums(hooked, 3).add(batch))
    with pytest.raises(UsageError, match="content"):
        ours.merge(AttentionSums(hooked, 2, content=False).add(batch))
    with pytest.raises(UsageError, match="clusters"):
        ours.add(batch, np.arange(4))
    with pytest.raises(UsageError, match="one per sequence"):
        mask_attention(hooked, batch, clusters=np.arange(3))
    with pytest.raises(UsageError, match="add at least one batch"):
        AttentionSums(hooked, 2).frame()
