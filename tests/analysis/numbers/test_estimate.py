"""Intervals as columns, of single models and over training seeds."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as distributions

from loopmdm.analysis.numbers.estimate import across_seeds, half_width, with_interval
from loopmdm.analysis.numbers.stats import Z95


def test_half_widths_are_students_where_the_table_names_its_units():
    df = pd.DataFrame({"y_se": [0.1, 0.1, 0.1], "n_units": [8, 1000, 1]})
    halves = half_width(df, "y_se")
    assert halves[0] == pytest.approx(0.1 * distributions.t.ppf(0.975, 7)) and np.isnan(halves[2])
    assert halves[1] == pytest.approx(0.1962, abs=1e-4)
    assert half_width(df[["y_se"]], "y_se")[0] == pytest.approx(0.1 * Z95)


def test_an_interval_lies_around_its_value_and_other_columns_stay():
    df = pd.DataFrame({"y": [1.0, 2.0], "y_se": [0.1, np.nan], "error": 0.2, "n_units": 5}, index=[3, 7])
    found = with_interval(df, "y")
    half = distributions.t.ppf(0.975, 4)
    assert (found["low"][3], found["high"][3]) == pytest.approx((1 - 0.1 * half, 1 + 0.1 * half))
    assert found.loc[7, ["low", "high"]].isna().all()
    assert with_interval(df, "y", "error")["high"][7] == pytest.approx(2 + 0.2 * half)
    pd.testing.assert_frame_equal(found[df.columns], df)


def test_means_over_seeds_have_students_interval_and_one_seed_its_own():
    df = pd.DataFrame({"x": [2, 1, 1, 1, 2, 3], "y": [0.0, 1.0, 2.0, 6.0, 0.0, 5.0], "y_se": 9.0})
    found = across_seeds(df, "y", ["x"], "y_se")
    low, high = distributions.t.interval(0.95, 2, loc=3.0, scale=distributions.sem([1.0, 2.0, 6.0]))
    columns = ["mean", "low", "high", "n_seeds"]
    for row in (1, 2, 3):
        assert found.loc[row, columns].tolist() == pytest.approx([3.0, low, high, 3])
    assert found.loc[[0, 4], columns].to_numpy().tolist() == [[0.0, 0.0, 0.0, 2.0]] * 2
    assert found.loc[5, columns].tolist() == pytest.approx([5.0, 5 - Z95 * 9, 5 + Z95 * 9, 1])


def test_one_seeds_own_bounds_are_kept_and_unknown_ones_are_unknown():
    df = pd.DataFrame({"x": [1, 1, 2], "y": [0.1, 0.3, 0.9], "low": [0.0, 0.1, 0.5], "high": [0.4, 0.5, 0.95]})
    found = across_seeds(df, "y", ["x"])
    assert found["low"][0] == found["low"][1] == pytest.approx(0.2 - 12.706205 * 0.1, rel=1e-6)
    assert (found["low"][2], found["high"][2]) == (0.5, 0.95)
    assert across_seeds(df[["x", "y"]], "y", ["x"]).loc[2, ["low", "high"]].isna().all()
