"""Sinks are found where they were planted, on other sequences, and become a group of keys."""

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.attention import mask_attention, received_attention, sink_attention
from loopmdm.analysis.measures.attention.sinks import ReceivedSums, halves
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from tests.conftest import toy_config

LENGTH, SINK = 12, 4


def sequences(n=8, seed=4, **options):
    tokens = torch.randint(0, 22, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return mask_tokens(tokens, 22, mask_ratio=0.5, seed=1, **options)


def planted(bias, only_masked=False) -> HookedLoopMDM:
    """Scores 0, and `bias` for position SINK in head 0 (or only where it is masked)."""
    m = HookedLoopMDM(toy_config())

    def plant(scores, hook):
        out = torch.zeros_like(scores)
        chosen = m.context.masked[:, SINK].float() if only_masked else torch.ones(len(scores))
        out[:, 0, :, SINK] = bias * chosen[:, None]
        return out

    m.add_hook(lambda name: name.endswith("hook_attn_scores"), plant, is_permanent=True)
    return m


def test_a_planted_sink_is_found_at_the_factors_it_exceeds():
    # The sink receives e^2 = 7.4 times what the others do.
    frame = sink_attention(planted(2.0), sequences(), n_loops=2)
    number = frame.groupby(["factor", "head"])["n_sinks"].unique().map(list)
    assert number[3.0, 0] == [1] and number[5.0, 0] == [1] and number[10.0, 0] == [0]
    assert number[3.0, 1] == [0] and number[5.0, 1] == [0]
    places = received_attention(planted(2.0), sequences(), 1).sinks(5.0).places["loop.0.blocks.1."]
    assert places[0].any(-1).nonzero().tolist() == [[SINK]] and not places[1].any()


def test_the_masses_of_the_sink_and_of_the_others_by_hand():
    b = sequences()
    frame = sink_attention(planted(2.0), b, n_loops=1, factors=(5.0,))
    head = frame[(frame["head"] == 0) & (frame["query_group"] == "masked") & (frame["layer"] == 1)]
    mass = head.set_index("key_group")["mass"]
    weight = torch.ones(LENGTH)
    weight[SINK] = np.exp(2.0)
    weight = weight / weight.sum()
    expected = {"self": [], "sink": [], "masked": [], "clean": []}
    for masked in b.masked:
        for group in expected:
            per_query = []
            for q in masked.nonzero()[:, 0].tolist():
                state = {"masked": masked, "clean": ~masked}.get(group)
                keys = {"self": [q], "sink": [SINK] if q != SINK else []}.get(group)
                if keys is None:
                    keys = [k for k in state.nonzero()[:, 0].tolist() if k not in (q, SINK)]
                per_query.append(float(weight[keys].sum()))
            expected[group].append(np.mean(per_query))
    for group, values in expected.items():
        assert mass[group] == pytest.approx(np.mean(values), abs=1e-6)
    odds = head.set_index("key_group")["log_odds"]
    assert odds["masked"] == pytest.approx(0, abs=1e-5)  # but for the sink the head is indifferent
    assert (
        abs(mask_attention(planted(2.0), b, n_loops=1).query("layer == 1 and head == 0")["log_odds"]).max() > 0.1
    )


def test_masses_sum_to_one_and_without_sinks_nothing_changes(hooked):
    b = sequences()
    frame = sink_attention(hooked, b, n_loops=2, factors=(1.3, 1e9), content=True)
    sums = frame.groupby(["factor", "depth", "head", "query_group"])["mass"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    assert frame.loc[frame["factor"] == 1.3, "n_sinks"].max() > 0
    plain = mask_attention(hooked, b, n_loops=2)
    none = frame[(frame["factor"] == 1e9) & (frame["key_group"] != "sink")]
    columns = ["depth", "head", "query_group", "key_group", "mass", "mass_se", "lift", "log_odds", "content", "n"]
    pd.testing.assert_frame_equal(none[columns].reset_index(drop=True), plain[columns], atol=1e-6)
    empty = frame[(frame["factor"] == 1e9) & (frame["key_group"] == "sink")]
    assert empty["mass"].isna().all() and (empty["n"] == 0).all()


def test_a_sink_in_one_state_only_is_found_by_state():
    m, b = planted(3.0, only_masked=True), sequences(40)
    places = received_attention(m, b, 1).sinks(5.0, by="state").places["loop.0.blocks.1."][0]
    assert places[SINK].tolist() == [True, False]
    by_position = received_attention(m, b, 1).sinks(5.0).places["loop.0.blocks.1."][0]
    assert by_position[SINK].tolist() == [True, True]


def test_received_attention_equals_the_naive_loop(hooked):
    real = torch.ones(8, LENGTH, dtype=torch.long)
    real[2, 9:] = 0
    b = sequences(attention_mask=real)
    sums = received_attention(hooked, b, 2, batch_size=3)
    pattern = hooked.run_with_cache(b.tokens, n_loops=2, attention_mask=real)[1]["pattern", "loop", 1, 2]
    for k, state in ((3, 0), (3, 1), (10, 0)):
        found = []
        for i in range(8):
            if real[i, k] and int(not b.masked[i, k]) == state:
                queries = [q for q in range(LENGTH) if q != k and real[i, q]]
                found.append(float(pattern[i, 1, queries, k].mean()))
        assert float(sums.total["loop.1.blocks.2."][1, k, state]) == pytest.approx(sum(found), abs=1e-5)
        assert float(sums.count[k, state]) == len(found)


def test_sinks_come_from_the_other_half(hooked):
    # Each sequence attends to a position of its own half: sinks chosen on the same half would hold all mass.
    b, first = sequences(), torch.from_numpy(halves(np.arange(8), 0))
    half_of = {tuple(row.tolist()): bool(half) for row, half in zip(b.tokens, first, strict=True)}

    def plant(scores, hook):
        target = [2 if half_of[tuple(row.tolist())] else 7 for row in hooked.context.tokens]
        out = torch.zeros_like(scores)
        out[torch.arange(len(target)), :, :, target] = 4.0
        return out

    with hooked.hooks([(lambda name: name.endswith("hook_attn_scores"), plant)]):
        frame = sink_attention(hooked, b, n_loops=1, factors=(5.0,))
    assert (frame["n_sinks"] == 1).all()
    assert frame.loc[frame["key_group"] == "sink", "mass"].max() < 0.05


def test_halves_keep_clusters_together_and_differ_by_seed():
    clusters = np.repeat(np.arange(6), 3)
    half = halves(clusters, 0)
    assert half.sum() == 9 and all(len(set(half[clusters == c])) == 1 for c in range(6))
    assert any((halves(np.arange(20), seed) != halves(np.arange(20), 0)).any() for seed in (1, 2))


def test_shards_add_up(hooked):
    b = sequences()
    whole, merged = received_attention(hooked, b, 1), ReceivedSums()
    for span in (slice(0, 3), slice(3, 8)):
        merged.merge(received_attention(hooked, b.rows(span), 1))
    for prefix, total in whole.total.items():
        torch.testing.assert_close(merged.total[prefix], total, atol=1e-6, rtol=0)
    clusters = np.arange(8) // 2
    frame = sink_attention(hooked, b, n_loops=1, clusters=clusters, by_head=False, batch_size=3)
    again = sink_attention(hooked, b, n_loops=1, clusters=clusters, by_head=False)
    pd.testing.assert_frame_equal(frame, again, atol=1e-6)
    assert frame["head"].isna().all() and frame["mass_se"].notna().any()


def test_misuse_is_refused(hooked):
    b = sequences()
    with pytest.raises(UsageError, match="two halves"):
        sink_attention(hooked, b.rows(slice(0, 1)))
    with pytest.raises(UsageError, match="factors is empty"):
        sink_attention(hooked, b, factors=())
    for factor in (0.0, float("nan"), True, "5"):
        with pytest.raises(UsageError, match="factor must be a number above 0"):
            sink_attention(hooked, b, factors=(factor,))
    with pytest.raises(UsageError, match="by must be"):
        sink_attention(hooked, b, by="token")
    with pytest.raises(UsageError, match="no sequence"):
        ReceivedSums().sinks(3.0)
