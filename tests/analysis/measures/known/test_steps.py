"""Excess with edges cut: with none cut it is the excess, edges that carry nothing cost nothing."""

import pandas as pd
import pytest

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions.contexts import cut
from loopmdm.analysis.measures.known.steps import EDGES, excess_with_cuts
from loopmdm.analysis.measures.quality.likelihoods import excess_kl
from loopmdm.model.errors import UnknownNameError, UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import Sequences
from loopmdm.model.tasks.arithmetic import ARITHMETIC_TASKS
from loopmdm.model.tasks.test_sets import TestSet
from tests.conftest import toy_model

TASK = ARITHMETIC_TASKS["arithmetic"]


def case_of(m: HookedLoopMDM, n: int = 24) -> Case:
    tokens = TASK.sample(n, seed=5)
    return Case(m, TestSet("arithmetic", Sequences.of(tokens, TASK.predicted(tokens))))


def toy(**changes) -> HookedLoopMDM:
    return HookedLoopMDM(toy_model(d_vocab=len(TASK.symbols) + 1, n_ctx=TASK.n_nodes, **changes))


def rows(df: pd.DataFrame, edges: str, n_loops: int) -> pd.DataFrame:
    part = df[(df["edges"] == edges) & (df["n_loops"] == n_loops)]
    return part.drop(columns="edges").reset_index(drop=True)


def test_nothing_cut_is_the_excess_and_a_cut_is_that_of_cut():
    case = case_of(toy())
    df = excess_with_cuts(case, [1, 3], n_samples=1)
    assert df.groupby("edges", sort=False)["n_loops"].unique().map(list).to_dict() == {
        "none": [1, 3], "masked->masked": [3], "masked->clean": [3],
    }  # fmt: skip
    whole = excess_kl(case, [1, 3], 1)
    for count in (1, 3):
        wanted = whole[whole["n_loops"] == count].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows(df, "none", count), wanted, rtol=1e-5)
    with cut(case.m, "masked->clean", loops=[1, 2]):
        pd.testing.assert_frame_equal(rows(df, "masked->clean", 3), excess_kl(case, [3], 1), rtol=1e-5)
    assert not rows(df, "masked->clean", 3)["excess_kl"].equals(rows(df, "none", 3)["excess_kl"])


def test_edges_that_a_model_does_not_have_cost_nothing_to_cut():
    df = excess_with_cuts(case_of(toy(forbid_mask_to_mask=("loop",))), [2], n_samples=1)
    whole = rows(df, "none", 2)
    pd.testing.assert_frame_equal(rows(df, "masked->masked", 2), whole, rtol=1e-5)
    assert (rows(df, "masked->clean", 2)["excess_kl"] - whole["excess_kl"]).abs().max() > 1e-3


def test_on_the_trained_model_deep_values_come_by_masked_keys():
    df = excess_with_cuts(case_of(HookedLoopMDM.from_pretrained("arithmetic-loop"), 200), [1, 4], n_samples=1)
    four = df[df["hops"] == 4].set_index(["edges", "n_loops"])["excess_kl"]
    assert four["none", 4] < 0.1 < 1 < four["none", 1]
    assert four["masked->masked", 4] > four["none", 1] > four["masked->clean", 4]


def test_misuse_is_one_line():
    case = case_of(toy(), 4)
    with pytest.raises(UsageError, match="S = 1 there is no loop"):
        excess_with_cuts(case, [1], ("masked->masked",))
    with pytest.raises(UsageError, match="give some of none"):
        excess_with_cuts(case, [2], ())
    with pytest.raises(UnknownNameError, match="unknown set of edges 'x'"):
        excess_with_cuts(case, [2], (*EDGES, "x"))
