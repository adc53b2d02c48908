"""What a batch or sequences carry does what the same given beside them does, in every measure."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures import attention, interventions, representation, stopping
from loopmdm.analysis.measures.interventions.training_free import training_free
from loopmdm.analysis.measures.quality.decomposition import nelbo_decomposition
from loopmdm.model import HookedLoopMDM, Sequences, mask_tokens
from loopmdm.model.errors import UsageError
from loopmdm.model.stopping.rules import StateDelta
from tests.conftest import toy_model

DOCUMENTS = np.arange(12) // 3
MEASURES = [
    attention.mask_attention, attention.attention_shape, attention.attention_change, attention.attention_toggle,
    attention.sink_attention, attention.head_growth, attention.effect_tests, attention.specification_curve,
    representation.representation_change, representation.convergence, representation.fixed_point_residual,
    representation.effective_rank, representation.loop_similarity, representation.state_paths,
    lambda m, b, n, **rest: stopping.stopping_frontier(m, b, max_loops=n, n_thresholds=3, **rest),
    lambda m, b, n, **rest: stopping.loop_usage(m, b, StateDelta(0.55, max_loops=n), **rest),
]  # fmt: skip
LIKELIHOODS = [
    lambda m, s, **rest: stopping.stopping_frontier(m, s, n_thresholds=3, **rest),
    lambda m, s, **rest: stopping.loop_usage(m, s, StateDelta(0.55, max_loops=3), **rest),
    lambda m, s, **rest: interventions.mediated_share(m, s, 2, arms=[("masked->masked", False)], **rest),
    lambda m, s, **rest: interventions.effect_by_loop(m, s, lambda at: interventions.damp(m, 0.5, at), 2, **rest),
    lambda m, s, **rest: nelbo_decomposition(m, s, 2, n_bins=3, **rest),
    lambda m, s, **rest: nelbo_decomposition(m, s, 2, by="position", **rest),
]


@pytest.fixture
def tokens():
    return torch.randint(0, 22, (12, 10), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("measure", MEASURES)
def test_documents_come_with_the_batch_or_beside_it(hooked, tokens, measure):
    b = mask_tokens(tokens, 22, mask_ratio=0.5, attention_mask=torch.arange(10) < 9)
    beside = measure(hooked, b, 3, clusters=DOCUMENTS)
    pd.testing.assert_frame_equal(beside, measure(hooked, replace(b, clusters=DOCUMENTS), 3), check_exact=True)
    assert not beside.equals(measure(hooked, b, 3))
    with pytest.raises(UsageError, match="one per sequence: 12 expected, got 5"):
        measure(hooked, b, 3, clusters=DOCUMENTS[:5])


@pytest.mark.parametrize("measure", LIKELIHOODS)
def test_sequences_are_their_parts(hooked, tokens, measure):
    maskable = torch.arange(10) > 1
    beside = measure(hooked, tokens, maskable=maskable, clusters=DOCUMENTS)
    whole = measure(hooked, Sequences.of(tokens, maskable, clusters=DOCUMENTS))
    pd.testing.assert_frame_equal(beside, whole, check_exact=True)
    assert not beside.equals(measure(hooked, tokens, maskable=maskable))


def test_training_free_takes_sequences(tokens):
    m = HookedLoopMDM(toy_model(n_loop_layers=0, n_prelude_layers=3, n_coda_layers=0, max_loops=1))
    options = {"n_loops": (2,), "blocks": [(1, 1)], "dampings": ("none",)}
    real = torch.arange(10) < 8
    beside = training_free(m, tokens, attention_mask=real, clusters=DOCUMENTS, **options)
    sequences = Sequences.of(tokens, attention_mask=real, clusters=DOCUMENTS)
    pd.testing.assert_frame_equal(beside, training_free(m, sequences, **options), check_exact=True)
