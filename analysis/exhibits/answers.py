"""What the answers to claims share; which number answers a claim stands beside the figure that shows it.

An answer is a function from a task to an `Answer`.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.numbers import stats
from loopmdm.model.zoo.runs import Zoo, select


@dataclass(frozen=True)
class Answer:
    """An estimate with its 95% interval; over `n_seeds` trained models and `n` test items or documents.

    `verdict` is set only where there is an answer without an estimate.
    """

    estimate: float
    low: float
    high: float
    n_seeds: int
    n: int
    verdict: str = ""


class NotRun(LookupError):
    """The models or tables that a claim needs are not there."""


# --- from numbers to answers ---


def answer_of(values: np.ndarray, errors: np.ndarray, n: int, n_units: int) -> Answer:
    """The mean over seeds; for one seed Student's t over its test units, by the error given."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise NotRun
    half = stats.t95(n_units) * float(np.asarray(errors, dtype=float)[0])
    bounds = values[0] - half, values[0] + half
    return Answer(*stats.over_seeds(values, bounds), len(values), n)


def between_arms(ours: pd.DataFrame, theirs: pd.DataFrame, value: str, paired: str | None = None) -> Answer:
    """Difference of two arms: Welch over seeds; for one seed the paired column with its _se, or no interval."""
    if ours.empty or theirs.empty:
        raise NotRun
    if min(len(ours), len(theirs)) > 1:
        difference, low, high = stats.welch(ours[value].to_numpy(), theirs[value].to_numpy())
        return Answer(difference, low, high, min(len(ours), len(theirs)), int(ours["n"].iloc[0]))
    if paired is None:
        difference = float(ours[value].mean() - theirs[value].mean())
        return Answer(difference, float("nan"), float("nan"), 1, int(ours["n"].iloc[0]))
    row = ours.iloc[0]
    units = int(row.get("n_units", row["n"]))
    return answer_of(np.array([row[paired]]), np.array([row[f"{paired}_se"]]), int(row["n"]), units)


def nll(task: str, arm: str, n_loops: int) -> pd.DataFrame:
    """Test NELBO of an arm at one S, a row a seed."""
    df = tables.load("nll-by-loops")
    return df[(df["task"] == task) & (df["arm"] == arm) & (df["n_loops"] == n_loops)].sort_values("seed")


def looped(task: str) -> int:
    """S_max of the task's looped arm."""
    runs = Zoo.shipped().select(task=task, arm="loop")
    if not runs:
        raise NotRun
    return runs[0].s_max


def units(task: str) -> int:
    """Independent test units: grids, or documents where sequences share one."""
    df = tables.load("nll-by-loops")
    return int(df.loc[df["task"] == task, "n_units"].iloc[0])


def of_arm(df: pd.DataFrame, task: str, arm: str, first: bool = False) -> pd.DataFrame:
    """Rows of the models of a task's arm, of every seed or of the first one."""
    names = select(task=task, arm=arm).names(Zoo.shipped())
    return df[df["model"].isin(names[:1] if first else names)]


def rows_of(name: str, task: str, **where: object) -> pd.DataFrame:
    """Rows of a table that belong to the looped models of a task."""
    part = of_arm(tables.load(name), task, "loop")
    for column, value in where.items():
        part = part[part[column] == value]
    if part.empty:
        raise NotRun
    return part
