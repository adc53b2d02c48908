"""A measure's frame as a table to read."""

from collections.abc import Sequence

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from loopmdm.model.errors import UsageError

SETTINGS = ("n_loops", "nominal_mask_ratio", "factor", "step", "seed", "n_clues")
"""Columns of numbers that tell rows apart, beside those of words."""


def by_loop(df: pd.DataFrame, value: str, rows: str | Sequence[str] | None = None) -> pd.DataFrame:
    """One column of a measure's frame loop by loop: a row a group, a column a loop; the mean of what is left.

    `rows` names the columns that make groups, such as "layer" or ["layer", "head"]; else columns of words, and
    of settings (`SETTINGS`), that are not the same everywhere, so that layers and heads are averaged. Rows
    outside the loop, and without a value, are left out. UsageError for a frame without loops or these columns.

    >>> m = lm.open_model("sudoku-loop")
    >>> df = lm.mask_attention(m, m.mask("123456" * 6, ratio=0.5), n_loops=3)
    >>> lm.by_loop(df, "mass").shape  # two groups of queries, three of keys; three loops
    (6, 3)
    >>> lm.by_loop(df, "log_odds").index.tolist()  # of masked against clean keys: one a query group
    ['masked', 'clean']
    """
    if "loop" not in df:
        raise UsageError(f"by_loop needs a column `loop`; this frame has {', '.join(map(str, df.columns))}")
    numbers = [str(name) for name in df if is_numeric_dtype(df[name]) and not is_bool_dtype(df[name])]
    if value not in numbers or value == "loop":
        raise UsageError(f"by_loop reads a column of numbers, not {value!r:.80}; there are {', '.join(numbers)}")
    inside = df[df["loop"].notna() & df[value].notna()].astype({"loop": int})
    if rows is None:
        told = [str(name) for name in df if name not in numbers or name in SETTINGS]
        labels = [name for name in told if name != value and inside[name].nunique(dropna=False) > 1]
    else:
        labels = [rows] if isinstance(rows, str) else list(rows)
        unknown = [name for name in labels if name not in df or name in (value, "loop")]
        if unknown:
            known = ", ".join(map(str, df.columns))
            raise UsageError(f"rows={unknown[0]!r:.80} makes no groups; columns are {known}")
    means = inside.groupby([*labels, "loop"], sort=False, dropna=False)[value].mean()
    return means.unstack("loop").sort_index(axis=1) if labels else means.sort_index().to_frame().T
