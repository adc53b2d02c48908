"""What the answers to claims share; which number answers a claim stands beside the figure that shows it.

An answer is a function from a task to an `Answer`; a gate is one to a `Gate`, the positive control without which
the answer would say nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.declared import deciding
from loopmdm.analysis.numbers import contrasts, stats
from loopmdm.model.zoo.runs import Zoo, select

PValue = Callable[[float], float]
PLATEAU = {"sudoku": 0.72}
"""Validation NELBO at S_max, nats per token, above which a run has not left the plateau, as declared."""


def untested(margin: float) -> float:  # noqa: ARG001 - a p value as others
    """NaN: there is no test."""
    return float("nan")


@dataclass(frozen=True)
class Answer:
    """An estimate with its 95% interval; over `n_seeds` trained models and `n` test items or documents.

    `n_against` are the models of the arm that they are compared with, if there is one. `p` gives the two-sided p
    value that the truth is a margin; `note` is what else has to be said of it.
    """

    estimate: float
    low: float
    high: float
    n_seeds: int
    n: int
    p: PValue = field(default=untested, compare=False)
    note: str = ""
    n_against: int = 0


@dataclass(frozen=True)
class Gate:
    """Whether a positive control passed, and what it gave, in words with a number."""

    passed: bool
    said: str


class NotRun(LookupError):
    """The models or tables that a claim needs are not there."""


# --- from numbers to answers ---


def answer_of(values: np.ndarray, errors: np.ndarray, n: int, n_units: int, note: str = "") -> Answer:
    """Student's t over seeds; for one seed over its test units, by the error given. NaN: a run without a value."""
    values, errors = np.asarray(values, dtype=float), np.asarray(errors, dtype=float)
    known = np.isfinite(values)
    if not known.all():
        note = "; ".join(filter(None, (note, f"{(~known).sum()} of {len(known)} runs have none")))
        values, errors = values[known], errors[known]
    if not len(values):
        raise NotRun
    if len(values) > 1:
        estimate, error, freedom = contrasts.contrast((values,), (1,))
        if n_units < FEW and np.isfinite(errors).all():  # the same documents for all: their errors go together
            error, freedom = contrasts.crossed(error, freedom, float(errors.mean()), n_units)
        return by_t(estimate, error, freedom, len(values), n, note)
    return by_t(float(values[0]), float(errors[0]), n_units - 1, 1, n, note)


FEW = 30
"""Test units below which they carry an error of their own beside the seeds'."""


def on_few(seeds: tuple[float, float, float], values: pd.Series, weights: pd.Series) -> tuple[float, float, float]:
    """`seeds`, an estimate with its error and freedom over runs, crossed with the few documents they were read on.

    `values` is the same estimate by document, averaged over the runs.
    """
    _, over_items, n_items = stats.weighted_mean_and_error(values.to_numpy(), weights.to_numpy())
    return seeds[0], *contrasts.crossed(*seeds[1:], float(over_items), int(n_items))


def by_document(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series] | None:
    """Test NELBO by document, averaged over the models of `rows`, a column a loop count, and sequences of each.

    None where the test units of `rows`, of the table nll-by-loops, are not few.
    """
    if "n_units" not in rows or rows["n_units"].max() >= FEW:
        return None
    df = tables.load("nll-by-document")
    df = df[df["model"].isin(rows["model"])]
    return df.groupby(["document", "n_loops"])["nll"].mean().unstack(), df.groupby("document")["n"].first()


def by_t(estimate: float, error: float, freedom: float, n_seeds: int, n: int, note: str = "") -> Answer:
    """An estimate with its error and Student's t; no interval without a degree of freedom."""
    half = stats.t95(freedom + 1) * error

    def p(margin: float) -> float:
        from scipy import stats as distributions

        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.divide(abs(estimate - margin), error)
        return float(2 * distributions.t.sf(distance, freedom)) if freedom > 0 else float("nan")

    return Answer(estimate, estimate - half, estimate + half, n_seeds, n, p, note)


def between_arms(ours: pd.DataFrame, theirs: pd.DataFrame, value: str, paired: str | None = None) -> Answer:
    """Difference of two arms: Welch over seeds; for one seed the paired column with its _se, or no interval."""
    if ours.empty or theirs.empty:
        raise NotRun
    left, right, n = ours[value].to_numpy(), theirs[value].to_numpy(), int(ours["n"].iloc[0])
    if min(len(ours), len(theirs)) > 1:
        seeds = contrasts.contrast((left, right))
        if value == "nll":
            seeds = _on_documents(seeds, ours, theirs)
        return replace(by_t(*seeds, len(ours), n), n_against=len(theirs))
    if paired is None:
        return Answer(
            float(left.mean() - right.mean()), float("nan"), float("nan"), len(left), n, n_against=len(right)
        )
    row = ours.iloc[0]
    units = int(row.get("n_units", row["n"]))
    return answer_of(np.array([row[paired]]), np.array([row[f"{paired}_se"]]), n, units)


def _on_documents(
    seeds: tuple[float, float, float], ours: pd.DataFrame, theirs: pd.DataFrame
) -> tuple[float, float, float]:
    """The difference of two arms crossed with the documents that they were read on, where those are few."""
    means = []
    for arm in (ours, theirs):
        read = by_document(arm)
        if read is None:
            return seeds
        means.append((read[0][int(arm["n_loops"].iloc[0])], read[1]))
    (left, weights), (right, _) = means
    return on_few(seeds, left - right, weights)


def by_rank(ours: pd.DataFrame, theirs: pd.DataFrame, value: str) -> Answer:
    """Median difference of two arms with the exact rank-sum interval; one bad seed cannot carry it away."""
    if ours.empty or theirs.empty:
        raise NotRun
    left, right = ours[value].to_numpy(), theirs[value].to_numpy()
    estimate, low, high = contrasts.shift(left, right)
    pairs = int((left[:, None] > right).sum())
    return Answer(
        estimate, low, high, len(left), int(ours["n"].iloc[0]),
        lambda margin: contrasts.rank_p(left - margin, right),
        f"above in {pairs} of {left.size * right.size} pairs", len(right),
    )  # fmt: skip


def given_break(task: str, ours: pd.DataFrame, theirs: pd.DataFrame, paired: str | None = None) -> Answer:
    """Difference of the test NELBO of two arms among runs that left the plateau, beside the exact test of all."""
    if task not in PLATEAU:
        return between_arms(ours, theirs, "nll", paired)
    left, right = (arm[left_plateau(arm["model"], task)] for arm in (ours, theirs))
    whole = contrasts.rank_p(ours["nll"], theirs["nll"])
    told = f"left the plateau: {len(left)} of {len(ours)}, {len(right)} of {len(theirs)}"
    return replace(between_arms(left, right, "nll"), note=f"{told}; all runs by rank: p = {whole:.2g}")


def left_plateau(models: pd.Series, task: str) -> np.ndarray:
    """Which of some runs ended below the plateau of their task."""
    curves = tables.load("learning-curves")
    ends = curves[curves["n_loops"] == curves["max_loops"]].sort_values("point").groupby("model")["nelbo"].last()
    return (models.map(ends) < PLATEAU[task]).to_numpy()


def settled_runs(values: pd.Series, task: str, fresh: bool) -> pd.Series:
    """Of values by model those of runs that left the plateau, where the task has one.

    `fresh`: without the first seed, which was looked at when the estimand was written.
    """
    if task in PLATEAU:
        values = pd.Series(values[left_plateau(pd.Series(values.index, index=values.index), task)])
    first = Zoo.shipped().first(task).name
    return values.drop(index=first, errors="ignore") if fresh else values


def over_runs(values: pd.Series, n: int) -> Answer:
    """Student's t over runs; `n` test units each."""
    return answer_of(values.to_numpy(), np.full(len(values), np.nan), n, 1)


def mean_over_runs(values: pd.Series) -> tuple[float, float]:
    """Mean over runs and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def trend(x: np.ndarray, y: np.ndarray, n: int) -> Answer:
    """Slope of a straight line through runs [n], Student's t with n - 2."""
    from scipy import stats as distributions

    if len(x) < 3:
        raise NotRun
    line = distributions.linregress(x, y)
    return by_t(float(line.slope), float(line.stderr), len(x) - 2, len(x), n)


def nll(task: str, arm: str, n_loops: int) -> pd.DataFrame:
    """Test NELBO of an arm at one S, a row a seed."""
    df = tables.load("nll-by-loops")
    return df[(df["task"] == task) & (df["arm"] == arm) & (df["n_loops"] == n_loops)].sort_values("seed")


def ends(task: str, role: str) -> pd.DataFrame:
    """Test NELBO at S_max of their own of the runs that decide between arms: "loop", "base" or "deep"."""
    df = tables.load("nll-by-loops")
    names = [run.name for run in deciding(task)[role]]
    return df[df["model"].isin(names) & (df["n_loops"] == df["max_loops"])].sort_values("seed")


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
