"""Intervals as columns: `low` and `high` beside a value, 95%; what is drawn or compared is computed here.

Errors over test units become intervals by Student's t over the table's `n_units`; several training seeds become
their mean, whose interval is over seeds.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from loopmdm.analysis.numbers import stats


def half_width(df: pd.DataFrame, error: str) -> pd.Series:
    """Half of the 95% interval of the standard errors in a column: Student's t over the table's `n_units`.

    The normal law's where the table does not name its units; NaN below two.
    """
    if "n_units" not in df:
        return df[error] * stats.t95(np.inf)
    return df[error] * df["n_units"].map({units: stats.t95(units) for units in df["n_units"].unique()})


def with_interval(df: pd.DataFrame, value: str, error: str = "") -> pd.DataFrame:
    """With `low` and `high` of a column, from its standard errors in `error`: by default its name + _se."""
    half = half_width(df, error or f"{value}_se")
    return df.assign(low=df[value] - half, high=df[value] + half)


def across_seeds(df: pd.DataFrame, value: str, by: Sequence[str], error: str = "") -> pd.DataFrame:
    """With `mean` of a column over the training seeds that agree in `by`, its `low` and `high`, `n_seeds`.

    Every row holds its group's. Of one seed the bounds are those of the test units: from the standard errors
    in `error`, else the frame's own `low` and `high`; NaN where it has none.
    """
    if error:
        df = with_interval(df, value, error)
    own = df.reindex(columns=["low", "high"]).to_numpy(dtype=float)
    values, found = df[value].to_numpy(dtype=float), np.full((len(df), 4), np.nan)
    for rows in df.groupby(list(by), sort=False).indices.values():
        found[rows] = *stats.over_seeds(values[rows], tuple(own[rows[0]])), len(rows)
    return df.assign(**dict(zip(("mean", "low", "high", "n_seeds"), found.T, strict=True)))
