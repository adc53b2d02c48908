"""One forward gives what the measures give alone."""

import numpy as np
import pandas as pd
import pytest

from loopmdm.analysis.measures.attention import (
    attention_change,
    attention_shape,
    attention_survey,
    mask_attention,
    received_attention,
)
from loopmdm.analysis.measures.attention.masses import AttentionSums
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from tests.conftest import toy_config


@pytest.mark.parametrize("clusters", [None, np.array([0, 0, 1, 2])])
def test_the_survey_equals_its_parts(hooked, batch, clusters):
    frames = attention_survey(hooked, batch, 3, rank=True, clusters=clusters, batch_size=3)
    alone = {"clusters": clusters}
    pd.testing.assert_frame_equal(frames["masses"], mask_attention(hooked, batch, 3, **alone), atol=1e-6)
    pd.testing.assert_frame_equal(frames["shape"], attention_shape(hooked, batch, 3, **alone), atol=1e-6)
    pd.testing.assert_frame_equal(frames["change"], attention_change(hooked, batch, 3, **alone), atol=1e-5)
    assert "sinks" not in frames


def test_sinks_of_other_sequences_join_the_walk(hooked, batch):
    received = received_attention(hooked, batch.rows(slice(0, 2)), 2)
    ours = batch.rows(slice(2, 4))
    frame = attention_survey(hooked, ours, 2, received=received, factors=(1.3, 3.0))["sinks"]
    alone = AttentionSums(hooked, 2, False, True, received.sinks(1.3).groups).add(ours).frame()
    part = frame[frame["factor"] == 1.3].drop(columns="factor").reset_index(drop=True)
    # The survey's change over loops has patterns made, alone they are not: two roundings, and the logs of them.
    pd.testing.assert_frame_equal(part, alone, atol=1e-5)
    assert sorted(frame["factor"].unique()) == [1.3, 3.0]


def test_a_walk_runs_the_model_once(hooked, batch):
    ran = []
    with hooked.hooks([("blocks.0.hook_resid_pre", lambda x, hook: ran.append(1) and None)]):
        attention_survey(hooked, batch, 3, received=received_attention(hooked, batch, 3))
    assert len(ran) == 2  # the sinks' own walk, and one for all the rest


def test_a_model_without_loops_has_no_change_and_misuse_is_refused(batch):
    m = HookedLoopMDM(toy_config(n_loop_layers=0))
    assert set(attention_survey(m, batch)) == {"masses", "shape"}
    with pytest.raises(UsageError, match="MaskedBatch"):
        attention_survey(m, batch.tokens)
