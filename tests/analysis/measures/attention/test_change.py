"""Change of maps between loops against explicit loops and scipy's rank correlation."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from loopmdm.analysis.measures.attention.change import ChangeSums, attention_change, key_ranks
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from tests.conftest import toy_config


@pytest.mark.parametrize("padded", [False, True])
def test_changes_equal_the_naive_loop(hooked, clean, padded):
    mask = None
    if padded:
        mask = torch.ones_like(clean)
        mask[0, 6:] = 0
    b = mask_tokens(clean, 22, t=0.5, seed=2, attention_mask=mask)
    frame = attention_change(hooked, b, n_loops=3, batch_size=3).set_index(["loop", "layer", "head", "metric"])
    _, cache = hooked.run_with_cache(b.tokens, n_loops=3, attention_mask=mask)
    for loop, layer, head in ((1, 1, 0), (2, 1, 1), (2, 2, 0)):
        distances, correlations = [], []
        for i in range(4):
            keys = 6 if padded and i == 0 else 10
            queries = [q for q in range(10) if b.masked[i, q]]
            now, before = (cache["pattern", "loop", at, layer][i, head].double() for at in (loop, loop - 1))
            distances.append(float((now - before)[queries].norm() / now[queries].norm()))
            each = [spearmanr(now[q, :keys], before[q, :keys]).statistic for q in queries]
            correlations.append(np.mean(each))
        for metric, found in (("frobenius", distances), ("rank_correlation", correlations)):
            row = frame.loc[(loop, layer, head, metric)]
            assert row["value"] == pytest.approx(np.mean(found), abs=1e-5)
            assert row["standard_error"] == pytest.approx(np.std(found, ddof=1) / 2, abs=1e-5)
            assert row["n"] == 4


def test_the_first_loop_has_no_change(hooked, batch):
    for n_loops in (1, 2):
        frame = attention_change(hooked, batch, n_loops=n_loops)
        first = frame[frame["loop"] == 0]
        assert len(first) == 2 * 2 * 2 and first["value"].isna().all() and (first["n"] == 0).all()
        assert (frame["segment"] == "loop").all() and len(frame) == n_loops * 8


def test_maps_that_stand_still_and_maps_that_turn(hooked, batch):
    turned = torch.softmax(torch.arange(10.0), 0)
    plant = lambda x, hook: x * 0 + (turned if "loop.1" in hook.name else turned.flip(0))  # noqa: E731
    with hooked.hooks([(lambda name: name.endswith("hook_pattern"), plant)]):
        frame = attention_change(hooked, batch, n_loops=4)
    by = frame.pivot_table(index="loop", columns="metric", values="value")
    size = float((turned - turned.flip(0)).norm() / turned.norm())
    np.testing.assert_allclose(by.loc[1], [size, -1], atol=1e-5)
    np.testing.assert_allclose(by.loc[2], [size, -1], atol=1e-5)
    np.testing.assert_allclose(by.loc[3], [0, 1], atol=1e-6)


def test_ties_take_their_mean_rank_and_constant_rows_have_no_correlation(hooked, batch):
    ranks = key_ranks(torch.tensor([[[[0.2, 0.1, 0.2, 0.5, 0.0]]]]), torch.tensor([[True] * 4 + [False]]))
    assert ranks.flatten().tolist() == [3.5, 2, 3.5, 5, 1]
    with hooked.hooks([(lambda name: name.endswith("hook_pattern"), lambda x, hook: x * 0 + 0.1)]):
        frame = attention_change(hooked, batch, n_loops=2)
    rank = frame[frame["metric"] == "rank_correlation"]
    assert rank["value"].isna().all() and (rank["n"] == 0).all()


def test_shards_add_up_and_a_batch_does_not_reach_into_the_next(hooked, batch):
    whole = attention_change(hooked, batch, n_loops=3)
    parts = [ChangeSums(hooked, 3, rank=True).add(batch.rows(slice(i, i + 2))) for i in (0, 2)]
    pd.testing.assert_frame_equal(parts[0].merge(parts[1]).frame(), whole, atol=1e-5)
    pd.testing.assert_frame_equal(attention_change(hooked, batch, n_loops=3, batch_size=1), whole, atol=1e-5)


def test_misuse_is_refused(hooked, batch):
    with pytest.raises(UsageError, match="no looped layers"):
        attention_change(HookedLoopMDM(toy_config(n_loop_layers=0)), batch)
    with pytest.raises(UsageError, match="MaskedBatch"):
        attention_change(hooked, batch.tokens)
    with pytest.raises(UsageError, match="rank"):
        ChangeSums(hooked, 2, rank=True).merge(ChangeSums(hooked, 2))
    nothing = attention_change(hooked, mask_tokens(batch.clean, 22, mask_ratio=0.0), n_loops=2)
    assert nothing["value"].isna().all() and (nothing["n"] == 0).all()
