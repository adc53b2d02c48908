"""A measure counts no sequence out because its numbers are NaN, and rounds none of a double model's."""

import numpy as np
import pytest
import torch

from loopmdm.analysis import mask_attention, read_loops
from loopmdm.analysis.measures import MEASURES, Case, measure
from loopmdm.analysis.measures.attention import attention_survey, received_attention
from loopmdm.analysis.measures.interventions import cut, skip
from loopmdm.analysis.measures.stopping import record_loops
from loopmdm.model.errors import NotFiniteError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.stopping.rules import ArgmaxStable, EntropyDelta, KLDelta, SecondDifference, StateDelta
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


def test_double_models_are_measured_in_double(batch):
    """Of a float64 model: what must add up does to float64's digits, what is known from the patterns is that."""
    m = HookedLoopMDM(toy_model().double())
    with cut(m, "none"):
        _, cache = m.run_with_cache(batch.tokens, 3, names_filter=lambda name: name.endswith("pattern"))
    last, before = (cache["pattern", "loop", loop, 1].numpy() for loop in (2, 1))
    hidden = batch.masked.numpy()

    def of_masked(values):
        """Mean over each sequence's masked queries, then over sequences, by head."""
        return np.stack([per[:, rows].mean(1) for per, rows in zip(values, hidden, strict=True)]).mean(0)

    def column(frame, name, **where):
        for key, value in ({"loop": 2, "layer": 1} | where).items():
            frame = frame[frame[key] == value]
        return frame[name].to_numpy()

    with cut(m, "none"):
        masses, sinks, shape, change, toggle = (
            measure(name, m, 3, batch=batch)
            for name in (
                "mask-attention",
                "attention-sinks",
                "attention-shape",
                "attention-change",
                "attention-toggle",
            )
        )
    exact = {"rtol": 0, "atol": 1e-13}
    for frame in (masses, sinks[sinks["factor"] == 3.0]):
        whole = frame.groupby(["depth", "head", "query_group"])["mass"].sum()
        np.testing.assert_allclose(whole, 1, **exact)
    entropy = -(last * np.log(np.maximum(last, 1e-300))).sum(-1)
    np.testing.assert_allclose(column(shape, "entropy", query_group="masked"), of_masked(entropy), **exact)
    moved = [
        np.sqrt(((a - b)[:, rows] ** 2).sum((1, 2)) / (a[:, rows] ** 2).sum((1, 2)))
        for a, b, rows in zip(last, before, hidden, strict=True)
    ]
    np.testing.assert_allclose(column(change, "value", metric="frobenius"), np.mean(moved, 0), **exact)
    levels = toggle["attention_masked"] - toggle["attention_clean"]
    np.testing.assert_allclose(toggle["toggle"], levels, **exact)


def test_a_record_of_a_double_model_holds_what_its_rules_see(batch):
    """To the last digit: thresholds that are chosen on records decide online as they did there."""
    m = HookedLoopMDM(toy_model().double())
    rules = [
        rule(threshold=0.0, max_loops=3)
        for rule in (StateDelta, SecondDifference, EntropyDelta, KLDelta, ArgmaxStable)
    ]
    kept = record_loops(m, batch, rules, 3)
    for (name, values), rule in zip(kept.criteria.items(), rules, strict=True):
        online = m.run(batch.tokens, stop=rule).criterion
        torch.testing.assert_close(values.double(), online, rtol=1e-13, atol=1e-15, equal_nan=True, msg=name)
