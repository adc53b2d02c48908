"""A frame as a table to read: a row a group, a column a loop."""

import numpy as np
import pandas as pd
import pytest

import loopmdm as lm
from loopmdm.analysis.exhibits import tables


def test_a_column_a_loop_and_the_mean_over_layers_and_heads(hooked, batch):
    df = lm.mask_attention(hooked, batch, n_loops=3)
    found = lm.by_loop(df, "mass")
    assert list(found) == [0, 1, 2] and found.index.names == ["query_group", "key_group"]
    for loop, part in df[df["segment"] == "loop"].groupby("loop"):
        for (query, key), rows in part.groupby(["query_group", "key_group"]):
            assert found.loc[(query, key), loop] == pytest.approx(rows["mass"].mean())
    np.testing.assert_allclose(found.groupby("query_group").sum(), 1, atol=1e-6)
    assert lm.by_loop(df, "log_odds").index.tolist() == ["masked", "clean"]  # one a query group
    one = lm.by_loop(df.query("query_group == key_group == 'masked'"), "mass")
    np.testing.assert_allclose(one.loc["mass"], found.loc[("masked", "masked")])


def test_rows_are_what_they_are_asked_to_be(hooked, batch):
    df = lm.mask_attention(hooked, batch, n_loops=2).query("query_group == 'masked'")
    found = lm.by_loop(df, "log_odds", ["layer", "head"])
    own = df.query("segment == 'loop' and key_group == 'masked'").set_index(["loop", "layer", "head"])["log_odds"]
    assert all(found.loc[(layer, head), loop] == value for (loop, layer, head), value in own.items())
    read = lm.read_loops(hooked, batch, 2)
    first = lm.by_loop(read[read["sequence"] == 0], "entropy", "position")
    assert first.shape == (batch.tokens.shape[1], 2)


def test_settings_stay_apart_where_they_differ():
    found = lm.by_loop(tables.load("mask-attention"), "log_odds")
    assert {"model", "n_loops", "nominal_mask_ratio"} <= set(found.index.names)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("masss",), "by_loop reads a column of numbers, not 'masss'; there are "),
        (("segment",), "not 'segment'"),
        (("loop",), "not 'loop'"),
        (("mass", "laier"), "rows='laier' makes no groups; columns are "),
        (("mass", ["layer", "loop"]), "rows='loop' makes no groups"),
    ],
)
def test_what_cannot_be_read_is_said(hooked, batch, asked, message):
    with pytest.raises(lm.UsageError, match=message):
        lm.by_loop(lm.mask_attention(hooked, batch, n_loops=2), *asked)
    with pytest.raises(lm.UsageError, match="needs a column `loop`; this frame has a"):
        lm.by_loop(pd.DataFrame({"a": [1.0]}), "a")
