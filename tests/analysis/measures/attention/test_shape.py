"""Entropy, distance and concentration equal explicit loops, by hand and at their limits."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.attention.shape import ShapeSums, attention_shape
from loopmdm.analysis.watch.groups import Place, Seen, States
from loopmdm.analysis.watch.sums import Asks
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens


def naive(pattern, masked, real, query):
    """(entropy, distance, concentration) of one sequence and head; None without queries."""
    queries = [q for q in range(len(masked)) if real[q] and bool(masked[q]) == (query == "masked")]
    if not queries:
        return None
    entropy = np.mean([-sum(float(a) * math.log(a) for a in pattern[q] if a > 0) for q in queries])
    distance = np.mean([sum(float(a) * abs(q - k) for k, a in enumerate(pattern[q])) for q in queries])
    received = [np.mean([float(pattern[q, k]) for q in queries]) for k in range(len(masked))]
    return entropy, distance, max(received)


@pytest.mark.parametrize("padded", [False, True])
def test_shapes_equal_the_naive_loop(hooked, clean, padded):
    mask = None
    if padded:
        mask = torch.ones_like(clean)
        mask[0, 6:] = 0
    b = mask_tokens(clean, 22, t=0.5, seed=2, attention_mask=mask)
    frame = attention_shape(hooked, b, n_loops=2, batch_size=3)
    _, cache = hooked.run_with_cache(b.tokens, n_loops=2, attention_mask=mask)
    real = torch.ones_like(b.masked) if mask is None else mask != 0
    assert len(frame) == (2 + 2 * 2) * 2 * 2
    for row in frame.itertuples():
        name = f"blocks.{row.layer}.attn.hook_pattern"
        pattern = cache[name if pd.isna(row.loop) else f"loop.{row.loop}.{name}"]
        found = [naive(pattern[i, row.head], b.masked[i], real[i], row.query_group) for i in range(4)]
        found = np.array([f for f in found if f is not None])
        np.testing.assert_allclose([row.entropy, row.distance, row.concentration], found.mean(0), atol=1e-5)
        assert row.n == len(found)
        assert row.entropy_se == pytest.approx(found[:, 0].std(ddof=1) / len(found) ** 0.5, abs=1e-5)


def test_three_by_three_by_hand(hooked):
    pattern = torch.tensor([[[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]]]])
    states = States(torch.tensor([[True, True, False]]), torch.ones(1, 3).bool())
    seen = Seen.of(Place("loop.0.blocks.1.", 1, 0, states), pattern, asks=Asks(shape=True))
    vectors = ShapeSums(hooked).vectors(seen)[0, 0]
    # Masked queries 0 and 1: entropies ln 2 and 0, distances 0.5 and 0, key 1 receives (0.5 + 1) / 2.
    torch.testing.assert_close(vectors[0], torch.tensor([math.log(2) / 2, 0.25, 0.75, math.log(3), 5 / 6]))
    torch.testing.assert_close(vectors[1, 1:3], torch.tensor([0.2 * 2 + 0.3, 0.5]))


def test_uniform_attention_meets_its_nulls_and_one_key_concentrates(hooked, clean):
    mask = torch.ones_like(clean)
    mask[1, 5:] = 0
    b = mask_tokens(clean, 22, mask_ratio=0.5, attention_mask=mask)
    scores = lambda name: name.endswith("hook_attn_scores")  # noqa: E731
    with hooked.hooks([(scores, lambda x, hook: torch.where(x.isinf(), x, 0.0))]):
        frame = attention_shape(hooked, b, n_loops=2)
    np.testing.assert_allclose(frame["entropy"], frame["entropy_uniform"], atol=1e-5)
    np.testing.assert_allclose(frame["distance"], frame["distance_uniform"], atol=1e-5)
    np.testing.assert_allclose(frame["concentration"], (3 / 10 + 1 / 5) / 4, atol=1e-6)
    first = torch.zeros(10).scatter(0, torch.tensor(0), 1.0)
    with hooked.hooks([(lambda name: name.endswith("hook_pattern"), lambda x, hook: x * 0 + first)]):
        frame = attention_shape(hooked, b, n_loops=2)
    np.testing.assert_allclose(frame["concentration"], 1)
    np.testing.assert_allclose(frame["entropy"], 0, atol=1e-7)


def test_shards_add_up_and_empty_groups_are_nan(hooked, batch, clean):
    whole = attention_shape(hooked, batch, n_loops=2)
    parts = [ShapeSums(hooked, 2).add(batch.rows(slice(i, i + 2))) for i in (0, 2)]
    pd.testing.assert_frame_equal(parts[0].merge(parts[1]).frame(), whole, atol=1e-6)
    nothing = attention_shape(hooked, mask_tokens(clean, 22, mask_ratio=0.0), n_loops=1)
    empty = nothing[nothing["query_group"] == "masked"]
    assert (empty["n"] == 0).all() and empty[["entropy", "distance", "concentration"]].isna().all(axis=None)
    with pytest.raises(UsageError, match="MaskedBatch"):
        attention_shape(hooked, clean)
