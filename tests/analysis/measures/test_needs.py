"""A measure on a model that lacks a fact says which, in one line; what does not need it runs."""

from dataclasses import replace

import pytest
import torch

from loopmdm.analysis import mask_attention, read_loops, representation_change
from loopmdm.analysis.measures import MEASURES
from loopmdm.analysis.measures.attention import attention_shape
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.options import OnTests
from loopmdm.model import nelbo, sample
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import NEEDS, Facts
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.test_sets import TestSet
from tests.loopmdm_model.models import InjectedToy


@pytest.fixture
def causal() -> HookedLoopMDM:
    torch.manual_seed(0)
    return HookedLoopMDM(InjectedToy().eval())


@pytest.fixture
def given(clean) -> MaskedBatch:
    return MaskedBatch(clean, clean, torch.zeros_like(clean, dtype=torch.bool))


def test_masked_groups_of_a_causal_model_without_masks_are_refused_by_the_fact(causal, given, clean):
    calls = {
        "attention between masked and clean positions": lambda: mask_attention(causal, given, n_loops=2),
        "the likelihood": lambda: nelbo(causal, clean, n_loops=2),
        "sample": lambda: sample(causal, n=1, steps=2),
    }
    for who, call in calls.items():
        with pytest.raises(
            UsageError, match=r"needs a model with a \[MASK\] token.*facts\.mask_token_id = None"
        ) as said:
            call()
        assert str(said.value).startswith(who) and "\n" not in str(said.value)


def test_what_needs_no_masks_runs(causal, given):
    frame = attention_shape(causal, given, n_loops=2)
    clean = frame[frame["query_group"] == "clean"]
    assert len(clean) == 2 * 2 and clean["entropy"].notna().all()
    assert frame[frame["query_group"] == "masked"]["n"].eq(0).all()
    change = representation_change(causal, given, n_loops=2)
    assert change[(change["token_group"] == "clean") & (change["loop"] > 0)]["value"].notna().any()
    assert len(read_loops(causal, given, n_loops=2)) == 2 * given.tokens.numel()


def test_every_registered_measure_names_what_it_needs(causal, clean):
    case = Case(causal, TestSet("sudoku6", Sequences.of(clean), float("nan")), OnTests(2, 4))
    for name, item in MEASURES.items():
        assert set(item.needs) <= NEEDS.keys()
        if "masks" in item.needs and item.answers("sudoku6"):
            with pytest.raises(UsageError, match=f"^{name} needs a model with"):
                item.check(case)


def test_each_fact_refuses_its_need():
    fine = Facts(mask_token_id=3)
    fine.need(*NEEDS, by="x")
    lacking = {"masks": {"mask_token_id": None}, "bidirectional": {"causal": True}, "unshifted": {"shifted": True}}
    lacking |= {
        "additive": {"additive": False},
        "linear_heads": {"linear_heads": False},
        "nested": {"nested": False},
        "fixed_start": {"random_start": True},
    }
    assert lacking.keys() == NEEDS.keys()
    for need, change in lacking.items():
        ((field, value),) = change.items()
        with pytest.raises(UsageError, match=rf"^x needs .*\(facts\.{field} = {value}\)$"):
            replace(fine, **change).need(need, by="x")
