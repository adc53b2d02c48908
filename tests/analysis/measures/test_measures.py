"""Any measure on any model, masked or along its own samples; what does not fit is refused in one line."""

from dataclasses import FrozenInstanceError

import numpy as np
import pandas as pd
import pytest
import torch

from loopmdm.analysis.measures import MEASURES, Measure, measure
from loopmdm.analysis.measures.attention import mask_attention
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.numbers import frames
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from tests.commands import loopmdm as run
from tests.commands import one_line


def test_a_measure_runs_at_every_mask_ratio_on_the_test_set():
    frame = measure("mask-attention-pooled", "sudoku-loop", 3, mask_ratios=(0.25, 0.75), n=16)
    assert frame.columns[:2].tolist() == ["model", "task"] and set(frame["task"]) == {"sudoku6"}
    case = Case.of("sudoku-loop", 3, 16)
    alone = mask_attention(case.m, case.masked(0.75), 3, by_head=False)
    part = frame[frame["nominal_mask_ratio"] == 0.75].reset_index(drop=True)
    pd.testing.assert_frame_equal(part[alone.columns.tolist()], alone)
    assert (frame["n_units"] == 16).all()


def test_along_sampling_sees_what_the_sampler_saw():
    case = Case.of("sudoku-loop", 2, 8)
    seen = dict(case.along_sampling(6, at=[0, 2, 5]))
    assert list(seen) == [0, 2, 5] and seen[0].mask_ratio == 1.0
    assert torch.equal(seen[0].clean, seen[5].clean) and not (seen[0].clean == case.m.cfg.mask_token_id).any()
    assert not (seen[5].masked & ~seen[2].masked).any()  # what is revealed stays
    with pytest.raises(UsageError, match="0 to 5"):
        list(case.along_sampling(6, at=[6]))
    frame = measure("mask-attention-pooled", "sudoku-loop", 2, n=8, along_sampling=6)
    assert "n_units" not in frame  # its errors are over samples
    assert frame["step"].nunique() == 5 and frame["mask_ratio"].is_monotonic_decreasing
    first = frame[(frame["step"] == 0) & (frame["key_group"] == "clean")]
    assert (first["n"] == 0).all() and first["mass"].isna().all()  # nothing is clean yet


def test_clusters_and_validation_belong_to_the_task():
    case = Case.of("sotu-loop", 2, 32)
    assert case.clusters is not None and len(np.unique(case.clusters)) == 8 == case.n_units
    assert not set(map(tuple, case.validation.tokens.tolist())) & set(map(tuple, case.test.tokens.tolist()))


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("mask-atention", "sudoku-loop"), {}, "mask-attention"),
        (("mask-attention", "sudoku-lop"), {}, "sudoku-loop"),
        (("belief-rounds", "sudoku-loop"), {}, "tree"),
        (("sudoku-boards", "sotu-loop"), {}, "sudoku6"),
        (("attention-change", "sudoku-base"), {}, "at least 2"),
        (("training-free", "sudoku-loop"), {}, "non-looped"),
        (("mask-attention", "sudoku-loop", 0), {}, "n_loops"),
        (("mask-attention", "sudoku-loop", 2), {"mask_ratios": (1.5,)}, "0..1"),
        (("mask-attention", "sudoku-loop", 2), {"n": 0}, "n must"),
        (("mask-attention", "sudoku-loop", [1, 2]), {}, "n_loops"),
        (("mediated-share", "sudoku-loop", 2), {"along_sampling": 8}, "takes no along_sampling"),
        (("fixed-points", "sudoku-loop"), {"n_sequences": "few"}, "n_sequences takes an integer such as 16"),
        (("mask-attention", []), {}, "needs a model"),
    ],
)
def test_misuse_is_named(arguments, options, says):
    with pytest.raises(UsageError, match=says):
        measure(*arguments, **options)


def test_several_models_on_a_batch_of_ones_own():
    m = HookedLoopMDM.from_pretrained("sudoku-loop")
    b = Case.of(m, n=8).masked(0.5)
    frame = measure("mask-attention-pooled", [m, "sudoku-base"], 2, batch=b)
    alone = mask_attention(m, b, 2, by_head=False)
    part = frame[frame["model"] == "sudoku-loop"].reset_index(drop=True)
    pd.testing.assert_frame_equal(part[alone.columns.tolist()], alone)
    assert set(frame["model"]) == {"sudoku-loop", "sudoku-base"} and (frame["n_units"] == 8).all()
    with pytest.raises(UsageError, match="leave batch= out"):
        measure("mediated-share", m, 2, batch=b)


def test_options_are_frozen_and_print_what_is_not_usual():
    item = MEASURES["fixed-points"]
    asked = item.options.of(item.name, {"n_loops": 3, "mask_ratios": [0.5], "least_loops": 8})
    assert str(asked) == "n_loops=3, mask_ratios=(0.5,), least_loops=8" and hash(asked)
    with pytest.raises(FrozenInstanceError):
        asked.n = 3
    for one in MEASURES.values():
        assert one.options.of(one.name, one.options().asked()) == one.options(), one.name


def test_a_measures_own_options_reach_it():
    few, more = (measure("fixed-points", "sudoku-loop", 2, mask_ratios=(0.5,), n=8, n_sequences=k, least_loops=4)
                 for k in (2, 4))  # fmt: skip
    assert (few["n_units"] == 2).all() and (more["n_units"] == 4).all()


def test_a_new_measure_is_one_function_and_one_entry(monkeypatch):
    """The README's example."""

    def hidden_norm(case, b):
        rows = []
        for loop, (state, _) in enumerate(case.m.states(b.tokens, case.n_loops)):
            rows.append((case.n_loops, loop, float(state[b.masked].norm(dim=-1).mean()), len(b)))
        return pd.DataFrame(rows, columns=["n_loops", "loop", "value", "n"])

    monkeypatch.setitem(MEASURES, "hidden-norm", Measure("hidden-norm", "norm of masked states", hidden_norm))
    frame = measure("hidden-norm", "sudoku-loop", 4, mask_ratios=(0.5,), n=8)
    assert frame["loop"].tolist() == [0, 1, 2, 3] and (frame["value"] > 0).all()


def test_the_command_prints_tsv_and_writes_a_table(tmp_path):
    out = tmp_path / "t.parquet"
    printed, _ = run("measure", "effective-rank", "sudoku-loop", "--n", "8", "--mask-ratios", "0.5", "--out", out)
    lines, table = [line.split("\t") for line in printed.splitlines()], frames.read_table(out)
    assert lines[0] == list(table.columns) and len(lines) == len(table) + 1
    assert list(table.attrs["models"]) == ["sudoku-loop"]
    listed, _ = run("measure", "list")
    assert len(listed.splitlines()) == len(MEASURES) + 1
    for wrong in (["measure", "effective-rank"], ["measure", "nothing", "sudoku-loop"],
                  ["measure", "effective-rank", "sudoku-loop", "--mask-ratios", "half"],
                  ["measure", "effective-rank", "sudoku-loop", "--out", tmp_path / "t.csv"]):  # fmt: skip
        _, said = run(*wrong, code=2)
        assert one_line(said), said
