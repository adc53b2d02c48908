"""How each claim's estimand is read off the tables: one function a claim, from a task to an `Answer`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from loopmdm.analysis.exhibits import tables
from loopmdm.model import stats
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


def over_seeds(values: np.ndarray, errors: np.ndarray, n: int, n_units: int) -> Answer:
    """Student's t over seeds; for one seed over its test units, by the error given."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise NotRun
    mean = float(values.mean())
    if len(values) > 1:
        half = stats.t95(len(values)) * float(values.std(ddof=1)) / len(values) ** 0.5
    else:
        half = stats.t95(n_units) * float(np.asarray(errors, dtype=float)[0])
    return Answer(mean, mean - half, mean + half, len(values), n)


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
    return over_seeds(np.array([row[paired]]), np.array([row[f"{paired}_se"]]), int(row["n"]), units)


def _nll(task: str, arm: str, n_loops: int) -> pd.DataFrame:
    df = tables.load("nll-by-loops")
    return df[(df["task"] == task) & (df["arm"] == arm) & (df["n_loops"] == n_loops)].sort_values("seed")


def _looped(task: str) -> int:
    """S_max of the task's looped arm."""
    runs = Zoo.shipped().select(task=task, arm="loop")
    if not runs:
        raise NotRun
    return runs[0].s_max


def _units(task: str) -> int:
    """Independent test units: grids, or documents where sequences share one."""
    df = tables.load("nll-by-loops")
    return int(df.loc[df["task"] == task, "n_units"].iloc[0])


def _of_arm(df: pd.DataFrame, task: str, arm: str, first: bool = False) -> pd.DataFrame:
    """Rows of the models of a task's arm, of every seed or of the first one."""
    names = select(task=task, arm=arm).names(Zoo.shipped())
    return df[df["model"].isin(names[:1] if first else names)]


def _rows(name: str, task: str, **where: object) -> pd.DataFrame:
    """Rows of a table that belong to the looped models of a task."""
    part = _of_arm(tables.load(name), task, "loop")
    for column, value in where.items():
        part = part[part[column] == value]
    if part.empty:
        raise NotRun
    return part


# --- one function a claim ---


def _fewer_flops(task: str) -> Answer:
    df = tables.load("flops-to-target")
    part = df[(df["task"] == task) & (df["arm"] == "loop") & (df["against"] == "base") & (df["share"] == 1)]
    if part.empty:
        raise NotRun
    row = part.iloc[0]
    if row["n_reached"] == 0 and row["n"] > 1:  # no looped run gets there within the budget
        return Answer(*[float("nan")] * 3, int(row["n"]), 0, "not supported")
    return Answer(row["ratio"], row["low"], row["high"], int(row["n"]), 0)


def _against(arm: str, at: Callable[[int], int]) -> Callable[[str], Answer]:
    def answer(task: str) -> Answer:
        ours, theirs = _nll(task, "loop", at(_looped(task))), _nll(task, arm, 1)
        return between_arms(ours, theirs, "nll", "change_from_base" if arm == "base" else None)

    return answer


def _change(last: Callable[[int], int], first: Callable[[int], int]) -> Callable[[str], Answer]:
    """NELBO at one S less that at another, of the same looped models."""

    def answer(task: str) -> Answer:
        most = _looped(task)
        ours, theirs = _nll(task, "loop", last(most)), _nll(task, "loop", first(most))
        values = ours["nll"].to_numpy() - theirs["nll"].to_numpy()
        errors = ours["change_from_s1_se"].to_numpy()  # of one seed; against S = 1 only
        if first(most) != 1 and len(values) == 1:
            errors = np.full(1, np.nan)
        return over_seeds(values, errors, int(ours["n"].iloc[0]), int(ours["n_units"].iloc[0]))

    return answer


def _most_by_half(task: str) -> Answer:
    most = _looped(task)
    one, half, whole = (_nll(task, "loop", s)["nll"].to_numpy() for s in (1, most // 2, most))
    gain = one - whole
    shares = np.where(gain > 0, (one - half) / gain, np.nan)  # no gain, no share of it: undecided
    return over_seeds(shares, np.full(len(gain), np.nan), len(gain), 1)


def _intermediate_noise(task: str) -> Answer:
    df = _rows("noise-level", task, n_loops=_looped(task))
    values = []
    for _, part in df.groupby("model"):
        low, mid, high = (
            part[(part["mask_ratio"] > a) & (part["mask_ratio"] < b)]["gain"].mean()
            for a, b in ((0, 0.3), (0.3, 0.7), (0.7, 1))
        )
        values.append(mid - max(low, high))
    return over_seeds(np.array(values), np.full(len(values), np.nan), int(df["n"].min()), 1)


def _by_loop(task: str, column: str, **where: object) -> pd.DataFrame:
    """A column of `mask-attention` by model and loop: masked queries, looped layers, heads pooled, to 3 S_max."""
    df = _rows("mask-attention", task, query_group="masked", segment="loop", nominal_mask_ratio=0.5, **where)
    df = df[df["head"].isna() & (df["n_loops"] == df["n_loops"].max())]
    return df.pivot_table(index="model", columns="loop", values=column)


def _rise(column: str, relative: bool = False) -> Callable[[str], Answer]:
    def answer(task: str) -> Answer:
        values = _by_loop(task, column, key_group="masked")
        rise = values[_looped(task) - 1] - values[0]
        rise = rise / values[0] if relative else rise
        n = int(_rows("mask-attention", task, key_group="masked")["n"].max())
        return over_seeds(rise.to_numpy(), _rise_error(task, column, relative), n, _units(task))

    return answer


def _rise_error(task: str, column: str, relative: bool) -> np.ndarray:
    """Error of a rise in one model, its two ends taken as independent (on the safe side: they are paired)."""
    values, errors = (_by_loop(task, name, key_group="masked") for name in (column, f"{column}_se"))
    last = _looped(task) - 1
    error = np.hypot(errors[0], errors[last])
    return (error / values[0] if relative else error).to_numpy()


def _saturates(task: str) -> Answer:
    values, most = _by_loop(task, "log_odds", key_group="masked"), _looped(task)
    rise = values[most - 1] - values[0]
    further = ((values[2 * most - 1] - values[most - 1]) / rise).where(rise > 0)  # no rise: undecided
    return over_seeds(further.to_numpy(), np.full(len(further), np.nan), len(further), 1)


def _two_by_two(task: str) -> Answer:
    df = tables.load("nll-by-loops")
    df = df[(df["task"] == task) & (df["n_loops"] == df["max_loops"])].sort_values("seed")
    arms = {
        arm: df[df["arm"] == arm]["nll"].to_numpy() for arm in ("loop", "base", "loop-isolated", "base-isolated")
    }
    if min(map(len, arms.values())) < 2:
        raise NotRun
    estimate, low, high = stats.interaction(*arms.values())
    return Answer(estimate, low, high, min(map(len, arms.values())), 1000)


def _solves(task: str) -> Answer:
    df = tables.load("sudoku-solve-rate")
    df = df[df["task"] == task]
    return between_arms(
        df[(df["arm"] == "loop") & (df["n_loops"] == _looped(task))],
        df[(df["arm"] == "base") & (df["n_loops"] == 1)],
        "solve_rate",
    )


def _verdict_rows(task: str) -> pd.DataFrame:
    """State-delta of every looped model, in the order of seeds."""
    return _rows("stopping-verdicts", task, rule="state-delta").sort_values("seed")


def _halves_loops(task: str) -> Answer:
    rows = _verdict_rows(task)
    share = np.where(rows["verdict"] == "supported", rows["mean_loops"] / rows["of_loops"], 1.0)
    errors = rows["mean_loops_se"] / rows["of_loops"]
    return over_seeds(share, errors.to_numpy(), int(rows["n"].iloc[0]), int(rows["n_units"].iloc[0]))


def _knows_where(task: str) -> Answer:
    rows = _verdict_rows(task)
    contrasts = rows[[f"against_{name}" for name in ("fixed", "schedule", "shuffled")]].to_numpy()
    errors = rows[[f"against_{name}_se" for name in ("fixed", "schedule", "shuffled")]].to_numpy()
    worst = contrasts.argmax(axis=1)  # the control that comes nearest, or wins
    index = np.arange(len(rows))
    return over_seeds(
        contrasts[index, worst], errors[index, worst], int(rows["n"].iloc[0]), int(rows["n_units"].iloc[0])
    )


def _shares(task: str, edges: str, matched: bool) -> pd.DataFrame:
    """Share of the gain lost by one arm, by model; NaN where there is no gain to lose."""
    rows = _rows("mediated-share", task, edges=edges, matched=matched)
    return rows.set_index("model")[["share", "share_se", "n"]].sort_index()


def _needs_mask_to_mask(task: str) -> Answer:
    cut, control = _shares(task, "masked->masked", False), _shares(task, "masked->masked", True)
    values = (cut["share"] - control["share"]).to_numpy()
    errors = np.hypot(cut["share_se"], control["share_se"]).to_numpy()
    return over_seeds(values, errors, int(cut["n"].iloc[0]), _units(task))


def _update_matters(task: str) -> Answer:
    rows = _shares(task, "stale", False)
    return over_seeds(rows["share"].to_numpy(), rows["share_se"].to_numpy(), int(rows["n"].iloc[0]), _units(task))


def _restricted_orders(task: str) -> Answer:
    rows = _rows("sudoku-orders", task, kind="contrast", order="row-major")
    n = int(rows["n"].iloc[0])
    return over_seeds(rows["contrast"].to_numpy(), rows["standard_error"].to_numpy(), n, n)


def _repair(task: str) -> Answer:
    rows, most = _rows("sudoku-boards", task), _looped(task)
    rows = rows[(rows["loop"] >= 1) & (rows["loop"] < most)]
    sums = rows.pivot_table(index="model", columns="metric", values="value", aggfunc="sum")
    values = (sums["repaired"] - sums["broken"]).to_numpy()
    return over_seeds(values, np.full(len(values), np.nan), int(rows["n"].max()), 1)


def _converge(task: str) -> Answer:
    rows = _rows("convergence", task, token_group="masked", metric="step_norm")
    n = int(rows["n"].iloc[0])
    return over_seeds(rows["value"].to_numpy(), rows["standard_error"].to_numpy(), n, _units(task))


def _zero_shot(task: str) -> Answer:
    df, most = tables.load("zero-shot"), _looped(task)
    loop = _of_arm(df[df["n_loops"] == most], task, "loop", first=True).set_index("corpus")
    base = _of_arm(df[df["n_loops"] == 1], task, "base", first=True).set_index("corpus")
    if loop.empty or base.empty:
        raise NotRun
    difference = loop["nelbo"] - base["nelbo"]
    worst = str(difference.idxmax())
    error = float(np.hypot(loop.loc[worst, "standard_error"], base.loc[worst, "standard_error"]))
    units = int(loop.loc[worst, "n_documents"])
    return over_seeds(np.array([difference[worst]]), np.array([error]), int(loop.loc[worst, "n"]), units)


def _belief(task: str) -> Answer:
    rows = _rows("best-rounds", task, nominal_mask_ratio=0.5)
    values = [
        float(part["loop"].corr(part["best_round"].astype(float), method="spearman"))
        for _, part in rows.groupby("model")
    ]
    return over_seeds(np.nan_to_num(np.array(values)), np.full(len(values), np.nan), int(rows["n"].iloc[0]), 1)


def _training_free(task: str) -> Answer:
    rows = _of_arm(tables.load("training-free"), task, "base")
    rows = rows[(rows["n_loops"] == 2) & (rows["damping"] == "1/n_loops")]
    if rows.empty:
        raise NotRun
    n = int(rows["n"].iloc[0])
    return over_seeds(rows["change"].to_numpy(), rows["change_se"].to_numpy(), n, _units(task))


PLACES = ("loop-early", "loop-first", "loop-middle", "loop-late", "loop-two", "loop-whole")
"""Placements of the loop in five layers, the claimed one first."""


def _placement(task: str) -> Answer:
    """Each at its own S_max; the best of the others is chosen by the same numbers, which is hard on the claim."""
    df = tables.load("nll-by-loops")
    df = df[(df["task"] == task) & (df["n_loops"] == df["max_loops"])]
    arms = {arm: df[df["arm"] == arm] for arm in PLACES}
    if any(part.empty for part in arms.values()):
        raise NotRun
    early = arms.pop(PLACES[0])
    return between_arms(early, min(arms.values(), key=lambda part: part["nll"].mean()), "nll")


def _word_problems(task: str) -> Answer:
    df = tables.load("word-problems")
    df = df[(df["task"] == task) & (df["problems"] == "gsm-symbolic")]
    ours = df[(df["arm"] == "loop") & (df["n_loops"] == _looped(task))]
    return between_arms(ours, df[(df["arm"] == "base") & (df["n_loops"] == 1)], "accuracy")


ANSWERS: dict[str, Callable[[str], Answer]] = {
    "fewer-training-flops": _fewer_flops,
    "better-at-equal-flops": _against("base", lambda s: s),
    "better-than-deeper": _against("deep", lambda s: s),
    "one-loop-is-worse": _against("base", lambda s: 1),  # noqa: ARG005
    "more-loops-are-better": _change(lambda s: s, lambda s: 1),  # noqa: ARG005
    "better-beyond-s-max": _change(lambda s: 2 * s, lambda s: s),
    "most-by-half": _most_by_half,
    "intermediate-noise": _intermediate_noise,
    "mask-to-mask-rises": _rise("log_odds"),
    "mask-to-mask-saturates": _saturates,
    "content-rises": _rise("content", relative=True),
    "trained-without-mask-to-mask": _two_by_two,
    "solves-what-shallow-cannot": _solves,
    "stopping-halves-loops": _halves_loops,
    "stopping-knows-where": _knows_where,
    "gain-needs-mask-to-mask": _needs_mask_to_mask,
    "update-matters": _update_matters,
    "restricted-orders-need-loops": _restricted_orders,
    "later-loops-repair": _repair,
    "loops-converge": _converge,
    "zero-shot": _zero_shot,
    "loop-is-a-round-of-belief-propagation": _belief,
    "training-free": _training_free,
    "placement": _placement,
    "reasoning": _word_problems,
}
