"""A measure counts no sequence out because its numbers are NaN: it ends in an error, or is not touched by them."""

import pytest
import torch

from loopmdm.analysis import mask_attention, read_loops
from loopmdm.analysis.measures import MEASURES, Case, measure
from loopmdm.analysis.measures.attention import attention_survey, received_attention
from loopmdm.analysis.measures.interventions import skip
from loopmdm.model.errors import NotFiniteError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.test_sets import TestSet
from tests.conftest import toy_model


def spoil(x, hook):
    """NaN in one of the sequences."""
    x[0] = float("nan")


ON_MASKS = [name for name, item in MEASURES.items() if item.on == "masks"]
OF_TOYS = [
    "causal-edges",
    "mediated-share",
    "cut-effects",
    "stale-effects",
    "nll",
    "noise-level",
    "loops-or-steps",
]
STATES = ("loop.1.hook_in", "loop.1.blocks.1.attn.hook_pattern", "loop.2.hook_out")


@pytest.mark.parametrize("name", ON_MASKS)
@pytest.mark.parametrize("site", STATES)
def test_every_measure_on_masks_refuses_states_that_are_not_finite(name, site, batch):
    m = HookedLoopMDM(toy_model())
    with m.hooks([(site, spoil)]), pytest.raises(NotFiniteError, match="not finite at"):
        measure(name, m, 3, batch=batch)


@pytest.mark.parametrize("name", OF_TOYS)
def test_measures_that_draw_their_own_masks_do_too(name, clean):
    item, m = MEASURES[name], HookedLoopMDM(toy_model())
    options = item.options.of(name, {"n_loops": (1, 3) if item.on == "loops" else 3})
    case = Case(m, TestSet("batch", Sequences.of(clean)), options)
    with m.hooks([("loop.1.hook_in", spoil)]), pytest.raises(NotFiniteError, match="not finite at"):
        item.of(case)


READS_OUT = ["mask-attention", "mask-attention-pooled", "attention-shape", "attention-sinks", "attention-toggle",
             "representation-change"]  # fmt: skip


@pytest.mark.parametrize("name", READS_OUT)
def test_what_runs_the_coda_refuses_its_logits(name, batch):
    m = HookedLoopMDM(toy_model())
    with m.hooks([("blocks.3.hook_mlp_out", spoil)]), pytest.raises(NotFiniteError, match="logits"):
        measure(name, m, 3, batch=batch)


def test_functions_beside_the_registry_refuse_them(batch):
    m = HookedLoopMDM(toy_model())
    for site in (*STATES, "blocks.3.hook_mlp_out"):
        for ask in (read_loops, attention_survey, received_attention):
            with m.hooks([(site, spoil)]), pytest.raises(NotFiniteError, match="not finite at"):
                ask(m, batch, 3)


def test_a_pattern_that_nobody_uses_is_refused_where_it_is_measured(batch):
    m = HookedLoopMDM(toy_model())
    with m.hooks([("loop.1.blocks.1.attn.hook_pattern", spoil)]), skip(m, 1):
        assert m(batch.tokens, n_loops=3)[..., :22].isfinite().all()
        with pytest.raises(
            NotFiniteError, match=r"loop\.1\.blocks\.1\.attn\.hook_pattern is not finite at 10 of 40"
        ):
            mask_attention(m, batch, 3)


def test_padding_may_be_what_it_likes(batch):
    m, real = HookedLoopMDM(toy_model()), torch.ones_like(batch.tokens)
    real[:, -2:] = 0
    hidden = batch.masked & (real != 0)
    b = MaskedBatch(batch.clean.masked_fill(hidden, 22), batch.clean, hidden, attention_mask=real)

    def padding(x, hook):
        x[:, -2:] = float("nan")

    expected = mask_attention(m, b, 3)
    with m.hooks([("blocks.3.hook_mlp_out", padding)]):
        assert mask_attention(m, b, 3)["mass"].equals(expected["mass"])
