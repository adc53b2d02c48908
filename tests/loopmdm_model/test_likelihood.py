"""The estimator against the enumeration of all masks."""

import itertools
import math

import numpy as np
import pytest
import torch

from loopmdm_model.errors import UsageError
from loopmdm_model.likelihood import draw_counts, masked_cross_entropy, nelbo, nelbo_by_loop
from loopmdm_model.masking import hide
from loopmdm_model.stopping import StateDelta
from tests.conftest import toy_model


def same(left, right):
    # float32 sums differ in the last bits with the batch's shape
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5, equal_nan=True)


def enumerated_nelbo(model, sequence: torch.Tensor, n_loops: int) -> float:
    """Exact nats per token: all 2^L - 1 masks, weighted 1 / (L * C(L, l)) each."""
    length = len(sequence)
    masks = torch.tensor([m for m in itertools.product([False, True], repeat=length) if any(m)])
    batch = hide(sequence.expand(len(masks), -1), masks, model.cfg.mask_token_id)
    losses = masked_cross_entropy(model(batch.tokens, n_loops=n_loops), batch)
    weights = torch.tensor([1 / (length * math.comb(length, int(m.sum()))) for m in masks])
    assert abs(float(weights.sum()) - 1) < 1e-5
    return float((losses * weights).sum())


@pytest.mark.parametrize("length", [2, 4, 8])
def test_estimate_equals_enumeration(length):
    model = toy_model(seed=length)
    sequence = torch.randint(0, 22, (length,), generator=torch.Generator().manual_seed(length))
    exact = enumerated_nelbo(model, sequence, 2)
    draws = 600
    repeats = [nelbo(model, sequence.expand(8, -1), n_loops=2, n_samples=draws // 20, seed=s) for s in range(20)]
    values = torch.tensor([r.mean for r in repeats])
    error = float(values.std() / len(values) ** 0.5)
    assert abs(float(values.mean()) - exact) < 4 * error
    assert error < 0.02 * exact  # tight enough to see a 7% bias


@pytest.mark.parametrize("length", [2, 4, 12])
@pytest.mark.parametrize("n_draws", [1, 3])
def test_counts_are_uniform_on_one_to_l(length, n_draws):
    lengths = torch.full((24,), length)
    counts = torch.cat([draw_counts(lengths, seed, d, n_draws) for seed in range(60) for d in range(n_draws)])
    share = torch.bincount(counts, minlength=length + 1)[1:] / len(counts)
    assert counts.min() >= 1 and counts.max() <= length
    torch.testing.assert_close(share, torch.full((length,), 1 / length), atol=0.02, rtol=0)


def test_each_sequence_visits_every_count_not_its_own_stratum():
    lengths = torch.full((12,), 12)
    seen = torch.stack([draw_counts(lengths, 0, draw) for draw in range(300)])
    assert all(len(set(column.tolist())) == 12 for column in seen.T)
    assert abs(float(seen.double().mean()) - 6.5) < 0.1


def test_batch_counts_are_stratified():
    counts = draw_counts(torch.full((16,), 16), seed=3, draw=0)
    assert sorted(counts.tolist()) == list(range(1, 17))


def test_all_loops_off_one_trajectory_equal_separate_runs(model, clean):
    together = nelbo_by_loop(model, clean, 4, n_samples=3, seed=1)
    for n_loops, result in enumerate(together, start=1):
        alone = nelbo(model, clean, n_loops=n_loops, n_samples=3, seed=1)
        same(result.per_sequence, alone.per_sequence)


def test_only_maskable_positions_count(model, clean):
    maskable = torch.zeros_like(clean, dtype=torch.bool)
    maskable[:3, 4:7] = True
    r = nelbo(model, clean, n_loops=1, n_samples=4, maskable=maskable)
    assert r.n == 3 and r.per_sequence[3].isnan() and math.isfinite(r.mean) and math.isfinite(r.standard_error)
    nothing = nelbo(model, clean, n_loops=1, maskable=torch.zeros_like(maskable))
    assert nothing.n == 0 and math.isnan(nothing.mean)


def test_padding_changes_no_value(model, clean):
    padded = torch.nn.functional.pad(clean, (0, 4), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(clean), (0, 4))
    ours = nelbo(model, padded, n_loops=2, n_samples=3, attention_mask=mask)
    same(ours.per_sequence, nelbo(model, clean, n_loops=2, n_samples=3).per_sequence)


def test_chunks_change_no_value(model, clean):
    whole = nelbo(model, clean, n_loops=2, n_samples=2)
    parts = nelbo(model, clean, n_loops=2, n_samples=2, batch_size=3)
    same(whole.per_sequence, parts.per_sequence)


def test_a_stopping_rule_reports_its_loops(model, clean):
    r = nelbo(model, clean, stop=StateDelta(float("inf"), max_loops=6), n_samples=2)
    same(r.per_sequence, nelbo(model, clean, n_loops=2, n_samples=2).per_sequence)
    assert r.mean_loops == 2


def test_misuse_is_refused(model, clean):
    with pytest.raises(UsageError, match="not both"):
        nelbo(model, clean, n_loops=2, stop=StateDelta(0.1, max_loops=3))
    with pytest.raises(UsageError, match=r"\[MASK\]"):
        nelbo(model, torch.full_like(clean, 22))
    for tokens in (clean[0], clean[:0]):
        with pytest.raises(UsageError, match="non-empty"):
            nelbo(model, tokens)
    with pytest.raises(UsageError, match="clusters"):
        nelbo(model, clean, n_samples=1, clusters=np.zeros(2))
    with pytest.raises(UsageError, match="n_samples"):
        nelbo(model, clean, n_samples=0)
