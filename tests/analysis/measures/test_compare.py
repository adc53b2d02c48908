"""Answers compared: nothing is NaN, equal answers differ in nothing, numbers are those by hand."""

import numpy as np
import pytest
import torch

from loopmdm.analysis import compare, cut
from loopmdm.model.adapters import hook_model
from loopmdm.model.errors import NotFiniteError, UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, Sequences, before_next
from tests.conftest import toy_model
from tests.loopmdm_model.adapters import natives


@pytest.fixture(scope="module")
def asked():
    torch.manual_seed(0)
    m = HookedLoopMDM(toy_model(d_vocab=7, n_ctx=8))
    return m, m.mask(torch.randint(0, 6, (3, 8)), ratio=0.5)


def test_equal_answers_differ_in_nothing(asked):
    m, b = asked
    same = compare(m, m, b, n_loops=2)
    assert len(same) == int(b.masked.sum()) and not same.isna().any().any()
    assert (same["change"] == 0).all() and (same["kl"] == 0).all() and not same["flipped"].any()


def test_numbers_are_those_by_hand(asked):
    m, b = asked
    one, two = m(b, n_loops=1), m(b, n_loops=3)
    found = compare(one, two, b)
    p, q = (x[..., :-1].double().softmax(-1) for x in (one, two))
    for row in found.itertuples():
        at = (row.sequence, row.pos)
        true = b.clean[at]
        assert row.true == true
        np.testing.assert_allclose([row.p_true_a, row.p_true_b], [p[at][true], q[at][true]], rtol=1e-5)
        np.testing.assert_allclose(row.change, (q[at][true] / p[at][true]).log(), atol=1e-5)
        np.testing.assert_allclose(row.kl, (p[at] * (p[at] / q[at]).log()).sum(), atol=1e-6)
        assert row.flipped == (p[at].argmax() != q[at].argmax())


def test_models_outputs_and_logits_without_mask_compare_alike(asked):
    m, b = asked
    with cut(m, "masked->masked"):
        changed = m(b, n_loops=2, mask_logit=False)
        whole = m(b, n_loops=2)
    plain = m(b, n_loops=2, mask_logit=False)
    one = compare(plain, changed, b)
    other = compare(m, whole, b, n_loops=2)
    np.testing.assert_allclose(one["kl"], other["kl"], atol=1e-6)
    assert (one["kl"] > 0).any()


def test_where_nobody_knows_the_truth_it_is_missing_and_the_rest_is_there(asked):
    m, b = asked
    blind = MaskedBatch(b.tokens, b.tokens, b.masked)
    found = compare(m(blind, n_loops=1), m(blind, n_loops=2), blind)
    assert found["true"].isna().all() and found["change"].isna().all()
    assert np.isfinite(found["kl"]).all()


def test_what_a_causal_model_is_asked_is_known_where_it_repeats_a_token():
    m = hook_model(natives.native("Llama"))
    b = before_next(Sequences.of(torch.tensor([[5, 5, 7, 7, 9]])))
    found = compare(m, m, b)
    assert found["true"].tolist() == [5, 7, 7, 9] and not found.isna().any().any()


def test_a_batch_without_questions_gives_no_rows(asked):
    m, b = asked
    nothing = MaskedBatch(b.clean, b.clean, torch.zeros_like(b.masked))
    assert len(compare(m, m, nothing)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_say_nothing_are_no_answers(asked, value):
    m, b = asked
    logits, (row, pos) = m(b, n_loops=1), b.masked.nonzero()[0]
    broken = logits.clone()
    broken[row, pos, 2] = value
    with pytest.raises(NotFiniteError, match=f"not finite at 1 of {int(b.masked.sum())}"):
        compare(logits, broken, b)
    shown = logits.clone()
    shown[~b.masked] = value  # nobody asks there
    assert np.isfinite(compare(logits, shown, b)["kl"]).all()


def test_misuse_is_named(asked):
    m, b = asked
    logits = m(b, n_loops=1)
    with pytest.raises(UsageError, match="needs the masked batch"):
        compare(m, m, b.tokens)
    with pytest.raises(UsageError, match="a answers"):
        compare(logits[:2], logits, b)
    with pytest.raises(UsageError, match="one vocabulary"):
        compare(logits, logits[..., :-1], b)
    with pytest.raises(UsageError, match="the batch hides ids from 4 on, which the answers lack"):
        compare(logits[..., :4], logits[..., :4], b)
    with pytest.raises(UsageError, match="give a model, or logits"):
        compare("sotu-loop", m, b)
