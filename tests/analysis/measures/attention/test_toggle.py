"""Toggles of planted models have the size that can be computed, and equal explicit loops."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures.attention import attention_toggle
from loopmdm.analysis.measures.attention.toggle import Keys, ToggleSums, toggled
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from tests.conftest import toy_config

LENGTH = 12


def sequences(n=6, ratio=0.5, **options):
    tokens = torch.randint(0, 22, (n, LENGTH), generator=torch.Generator().manual_seed(4))
    return mask_tokens(tokens, 22, mask_ratio=ratio, seed=1, **options)


def planted(bias) -> HookedLoopMDM:
    """Scores are `bias` for masked keys, else 0."""
    m = HookedLoopMDM(toy_config())

    def plant(scores, hook):
        return torch.zeros_like(scores) + bias * m.context.masked[:, None, None, :]

    m.add_hook(lambda name: name.endswith("hook_attn_scores"), plant, is_permanent=True)
    return m


@pytest.mark.parametrize("bias", [0.0, 1.3, -0.7])
def test_planted_toggles_have_the_computed_size(bias):
    # 6 of 12 masked: among the others of a toggled key are 5 masked and 6 clean, or 6 and 5.
    e, sizes = math.exp(bias), {}
    for others in (5, 6):
        clean = LENGTH - 1 - others
        sizes[others] = e / (e * (others + 1) + clean) - 1 / (e * others + clean + 1)
    b = sequences()
    pairs = toggled(planted(bias), b, 2, Keys(LENGTH, seed=0))
    assert set(pairs) == {"blocks.0.", "blocks.3.", *(f"loop.{i}.blocks.{j}." for i in (0, 1) for j in (1, 2))}
    for found in pairs.values():
        change = (found[..., 0] - found[..., 1]).sort(dim=-1).values
        expected = torch.tensor(sorted([sizes[5]] * 6 + [sizes[6]] * 6))  # every position is toggled once
        torch.testing.assert_close(change, expected.expand_as(change), atol=1e-6, rtol=0)
    frame = attention_toggle(planted(bias), b, n_loops=2, n_keys=LENGTH)
    np.testing.assert_allclose(frame["toggle"], (sizes[5] + sizes[6]) / 2, atol=1e-6)
    assert np.sign(frame["toggle"].round(7)).eq(np.sign(bias)).all()


def test_a_model_that_ignores_what_keys_hold_has_none(hooked):
    fixed = torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    with hooked.hooks([(lambda name: name.endswith("hook_attn_scores"), lambda x, hook: x * 0 + fixed)]):
        frame = attention_toggle(hooked, sequences(), n_loops=2)
    np.testing.assert_allclose(frame["toggle"], 0, atol=1e-7)
    assert (frame["attention_masked"] > 0.01).all()


def test_toggles_equal_the_naive_loop(hooked):
    real = torch.ones(6, LENGTH, dtype=torch.long)
    real[2, 8:] = 0
    b = sequences(attention_mask=real)
    frame = attention_toggle(hooked, b, n_loops=2, n_keys=LENGTH)  # every maskable position
    found = []
    for i in range(6):
        per_key = []
        for j in [j for j in range(LENGTH) if real[i, j]]:
            states = []
            for hidden in (True, False):
                tokens = b.tokens[i : i + 1].clone()
                tokens[0, j] = 22 if hidden else b.clean[i, j]
                _, cache = hooked.run_with_cache(tokens, n_loops=2, attention_mask=real[i : i + 1])
                queries = [q for q in range(LENGTH) if b.masked[i, q] and q != j]
                states.append(float(cache["pattern", "loop", 1, 2][0, 1, queries, j].mean()))
            per_key.append(states[0] - states[1])
        found.append(np.mean(per_key))
    row = frame[(frame["loop"] == 1) & (frame["layer"] == 2) & (frame["head"] == 1)].iloc[0]
    assert row["toggle"] == pytest.approx(np.mean(found), abs=1e-5)
    assert row["toggle_se"] == pytest.approx(np.std(found, ddof=1) / 6**0.5, abs=1e-5)
    assert row["toggle"] == pytest.approx(row["attention_masked"] - row["attention_clean"], abs=1e-6)
    assert row["n"] == 6


def test_only_what_could_be_masked_is_toggled(hooked):
    maskable = torch.zeros(6, LENGTH, dtype=torch.bool)
    maskable[:, :3] = True
    b, touched = sequences(maskable=maskable, ratio=0.7), set()

    def look(x, hook):
        touched.update((hooked_tokens() != b.tokens).nonzero()[:, 1].tolist())

    hooked_tokens = lambda: hooked.context.tokens  # noqa: E731
    with hooked.hooks([("loop.0.blocks.1.attn.hook_pattern", look)]):
        frame = attention_toggle(hooked, b, n_loops=1, n_keys=5)
    assert touched == {0, 1, 2}
    assert frame["toggle"].notna().all()


def test_parts_and_shards_draw_the_same_keys(hooked):
    b = sequences()
    whole = attention_toggle(hooked, b, n_loops=2, seed=3)
    pd.testing.assert_frame_equal(attention_toggle(hooked, b, n_loops=2, seed=3, batch_size=2), whole, atol=1e-6)
    parts = [ToggleSums(hooked, 2, seed=3).add(b.rows(slice(i, i + 3)), first_index=i) for i in (0, 3)]
    pd.testing.assert_frame_equal(parts[0].merge(parts[1]).frame(), whole, atol=1e-6)
    other = attention_toggle(hooked, b, n_loops=2, seed=4)
    assert not np.allclose(other["toggle"], whole["toggle"])
    clustered = attention_toggle(hooked, b, n_loops=2, seed=3, clusters=np.arange(6) // 2)
    np.testing.assert_allclose(clustered["toggle"], whole["toggle"], atol=1e-6)
    assert not np.allclose(clustered["toggle_se"], whole["toggle_se"])


def test_drawn_keys_do_not_follow_the_mask(hooked):
    # Same seed as the mask's: the lowest uniforms of its stream are the masked positions themselves.
    tokens = torch.randint(0, 22, (40, LENGTH), generator=torch.Generator().manual_seed(4))
    b = mask_tokens(tokens, 22, mask_ratio=0.5, seed=0)
    flips = []
    look = lambda x, hook: flips.append((hooked.context.tokens == 22).sum(1) - 6)  # noqa: E731
    with hooked.hooks([("loop.0.blocks.1.attn.hook_pattern", look)]):
        toggled(hooked, b, 1, Keys(2, seed=0))
    share = float((torch.stack(flips[1:]) > 0).float().mean())
    assert 0.3 < share < 0.7


def test_sequences_without_masked_queries_do_not_count(hooked, clean):
    frame = attention_toggle(hooked, mask_tokens(clean, 22, mask_ratio=0.0), n_loops=1)
    assert frame["toggle"].isna().all() and (frame["n"] == 0).all()
    with pytest.raises(UsageError, match="n_keys"):
        attention_toggle(hooked, mask_tokens(clean, 22, mask_ratio=0.5), n_keys=0)
    with pytest.raises(UsageError, match="MaskedBatch"):
        attention_toggle(hooked, clean)
