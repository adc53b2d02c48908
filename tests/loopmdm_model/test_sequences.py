"""Sequences keep what belongs together together, through rows, batches, masks and measures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loopmdm.model import MaskedBatch, Sequences, mask_tokens, nelbo, nelbo_by_loop
from loopmdm.model.diffusion.likelihood import Read, losses_after
from loopmdm.model.errors import UsageError
from loopmdm.model.sequences import Place

DOCUMENTS = np.array(["a", "a", "b", "c"])


@pytest.fixture
def real():
    real = torch.ones(4, 10, dtype=torch.bool)
    real[1, 7:] = real[3, 4:] = False
    return real


@pytest.fixture
def maskable():
    return torch.arange(10) >= 2


@pytest.fixture
def sequences(clean, maskable, real):
    return Sequences.of(clean, maskable, real.long(), DOCUMENTS)


def test_padding_is_never_maskable_and_what_is_missing_stays_missing(clean, sequences, maskable, real):
    assert torch.equal(sequences.allowed, maskable & real) and torch.equal(sequences.real, real)
    assert sequences.lengths.tolist() == [8, 5, 8, 2] and sequences.n_units == 3
    alone = Sequences.of(clean)
    assert alone.attention_mask is None and alone.maskable is None and alone.clusters is None
    assert alone.allowed.all() and alone.n_units == 4
    assert torch.equal(Sequences.of(clean, attention_mask=real).allowed, real)
    assert Sequences.of(clean, attention_mask=torch.ones_like(clean)).attention_mask is not None


def test_rows_batches_and_spread_keep_everything_in_step(sequences):
    index = torch.tensor([3, 0])
    for keep in (index, index.numpy(), slice(1, 3), torch.tensor([True, False, False, True])):
        rows = sequences.rows(keep)
        own = np.arange(4)[keep.numpy() if isinstance(keep, torch.Tensor) else keep]
        for name in ("tokens", "maskable", "real"):
            assert torch.equal(getattr(rows, name), getattr(sequences, name)[own])
        assert rows.clusters.tolist() == DOCUMENTS[own].tolist()
    parts = list(sequences.batches(3))
    assert [start for start, _ in parts] == [0, 3] and [len(part) for _, part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.tokens for _, part in parts]), sequences.tokens)
    assert sequences.spread(2).clusters.tolist() == ["a", "c"] and sequences.spread(9) is sequences


def test_rows_at_a_time_know_their_place_and_are_checked_once(sequences, monkeypatch):
    b, checked, check = mask_tokens(sequences, 22, mask_ratio=0.5), [], MaskedBatch.__post_init__
    shard = replace(b, place=Place(7, 20, (1,)))
    monkeypatch.setattr(MaskedBatch, "__post_init__", lambda self: checked.append(1) or check(self))
    for whole, starts, first, n in (
        (b, [0, 1, 2, 3], 0, 4),
        (shard, [0, 1, 2, 3], 7, 20),
        (shard, [0, 1, 3], 7, 20),
    ):
        checked.clear()
        parts = list(whole.each(1 if len(starts) == 4 else 2, len))
        assert [(span.start, part.place) for span, part, _ in parts] == [(s, Place(first + s, n)) for s in starts]
        assert len(checked) <= len(parts) + 1 and sum(n for _, _, n in parts) == len(b)


def test_a_masked_batch_remembers_the_sequences_it_was_made_of(sequences, real):
    b = mask_tokens(sequences, 22, mask_ratio=0.5)
    back = b.sequences
    assert torch.equal(back.tokens, sequences.tokens) and torch.equal(back.allowed, sequences.allowed)
    assert torch.equal(b.real, real) and back.clusters is b.clusters is sequences.clusters
    part = b.rows(slice(1, 3))
    assert part.clusters.tolist() == ["a", "b"] and torch.equal(part.real, real[1:3]) and part.n_units == 2
    plain = MaskedBatch(b.tokens, b.clean, b.masked)
    assert plain.attention_mask is None and plain.real.all() and plain.allowed.all()
    assert plain.mask_ratio == int(b.masked.sum()) / 40 and b.mask_ratio == int(b.masked.sum()) / 23


def test_likelihoods_of_sequences_are_those_of_their_parts(model, clean, sequences, maskable, real):
    beside = {"maskable": maskable, "attention_mask": real, "clusters": DOCUMENTS}
    for estimator in ("exact-count", "stratified-t"):
        one = nelbo(model, sequences, n_loops=2, n_samples=3, estimator=estimator)
        other = nelbo(model, clean, n_loops=2, n_samples=3, estimator=estimator, **beside)
        assert torch.equal(one.per_sequence, other.per_sequence)
        assert (one.mean, one.standard_error, one.flops) == (other.mean, other.standard_error, other.flops)
    curve = nelbo_by_loop(model, sequences, 2, n_samples=3)
    assert [r.mean for r in curve] == [r.mean for r in nelbo_by_loop(model, clean, 2, n_samples=3, **beside)]
    assert (
        nelbo(model, sequences, n_loops=2).standard_error
        != nelbo(model, clean, n_loops=2, maskable=maskable, attention_mask=real).standard_error
    )
    (_, part, losses), *_ = losses_after(model, sequences, [1, 2], Read(n_samples=1))
    assert part.clusters.tolist() == DOCUMENTS.tolist() and losses.shape == (2, int(part.masked.sum()))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"maskable": torch.ones(3, dtype=torch.bool)}, r"10 positions.*got shape \[3\]"),
        ({"attention_mask": torch.ones(4, 10)}, "boolean tensor.*torch.float32"),
        ({"clusters": [1, 2, 3]}, "one per sequence: 4 expected, got 3"),
        ({"clusters": 5}, "one per sequence"),
        ({"tokens": torch.zeros(0, 4, dtype=torch.long)}, "non-empty"),
        ({"tokens": torch.zeros(4, dtype=torch.long)}, "non-empty"),
        ({"tokens": torch.ones(2, 3, dtype=torch.bool)}, "integer tensor"),
        ({"tokens": "text"}, "integer tensor"),
    ],
)
def test_misuse_is_refused_in_one_line(clean, given, says):
    with pytest.raises(UsageError, match=says) as caught:
        Sequences.of(**({"tokens": clean} | given))
    assert "\n" not in str(caught.value)


def test_what_sequences_hold_is_not_given_twice(model, sequences):
    for name, value in (("maskable", sequences.allowed), ("clusters", DOCUMENTS)):
        with pytest.raises(UsageError, match=f"{name} is given beside Sequences"):
            nelbo(model, sequences, n_loops=1, **{name: value})
