"""Tables of training: learning curves, FLOPs to a target, and the contrasts between arms over seeds."""

import math
from typing import Any

import numpy as np
import pandas as pd

from loopmdm.analysis.measures.quality import efficiency
from loopmdm.analysis.numbers import contrasts
from loopmdm.analysis.numbers.stats import Z95
from loopmdm.model.files import read_json_lines
from loopmdm.model.network.checkpoints import METRICS, need, resolve
from loopmdm.model.zoo.runs import LOOPED, Run, Zoo

PAIRS = (("loop", "base"), ("deep", "base"), ("loop", "deep"))
"""Arms compared: what `arm` needs or reaches against what `against` does."""


def learning_curves_table(zoo: Zoo) -> pd.DataFrame:
    """Validation NELBO of EMA weights against training FLOPs, at S = 1 and S_max of training, every seed."""
    rows = []
    for model in zoo:
        most = model.record["spec"]["model"]["max_loops"]
        lines = read_json_lines(need(resolve(model.name), METRICS))
        for point, row in enumerate(lines, start=1):
            for s in sorted({1, most}):
                value, error = row[f"validation_nelbo_{s}"], row[f"validation_nelbo_{s}_se"]
                rows.append((model.name, model.task, model.arm, model.seed, point, row["step"], row["flops"],
                             row["tokens"], s, most, value, error))  # fmt: skip
    columns = ["model", "task", "arm", "seed", "point", "step", "flops", "tokens", "n_loops", "max_loops", "nelbo",
               "nelbo_se"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def flops_to_target_table(zoo: Zoo) -> pd.DataFrame:
    """What each arm needs for the NELBO another one has after a share of its budget; see `quality.efficiency`."""
    curves = learning_curves_table(zoo)
    curves = curves[curves["n_loops"] == curves["max_loops"]]
    tables = []
    for task, part in curves.groupby("task"):
        epoch_tokens = zoo.first(str(task)).record.get("epoch_tokens") or math.nan
        for arm, against in PAIRS:
            if {arm, against} <= set(part["arm"]):
                frame = efficiency.flops_to_target(part, arm, against, epoch_tokens)
                tables.append(frame.assign(task=task))
    return pd.concat(tables, ignore_index=True)


SETTING = (LOOPED, "loop-s4")
"""Looped arms whose gap to base is followed: the usual one, and the one that decides Sudoku."""
UNSETTLED = 0.25
"""Share of the budget that is left out: S is still widening there on most tasks."""
POINTS = 16


def looping_gap_table(zoo: Zoo) -> pd.DataFrame:
    """NELBO of a looped arm at S_max less that of base through training, against tokens a parameter of base.

    `at` "flops": both after the same FLOPs, `tokens` are those of base; "tokens": both after the same tokens. From
    a quarter of the budget on. 95%: Welch over seeds; of one seed on a side by the errors over validation
    sequences of both, as if they were others. Between points of evaluation curves run straight in log FLOPs or log
    tokens.
    """
    curves = learning_curves_table(zoo)
    curves = curves[curves["n_loops"] == curves["max_loops"]]
    rows: list[dict[str, Any]] = []
    for task, part in curves.groupby("task"):
        for arm in SETTING:
            if {arm, "base"} <= set(part["arm"]):
                ours, theirs = (_runs(part[part["arm"] == name]) for name in (arm, "base"))
                named = {"task": task, "arm": arm, "parameters": _parameters(zoo.first(str(task), "base"))}
                rows += [named | row for at in ("flops", "tokens") for row in _gaps(ours, theirs, at)]
    return pd.DataFrame(rows)


def _runs(part: pd.DataFrame) -> list[pd.DataFrame]:
    return [run.sort_values("flops") for _, run in part.groupby("model")]


def _parameters(run: Run) -> int:
    import torch  # late: other tables of training are made without

    from loopmdm.model.network.model import LoopMDM

    with torch.device("meta"):
        return LoopMDM(run.spec.config).n_parameters


def _gaps(ours: list[pd.DataFrame], theirs: list[pd.DataFrame], at: str) -> list[dict[str, Any]]:
    most = min(float(run[at].max()) for run in ours + theirs)
    points = most * np.linspace(UNSETTLED, 1, POINTS)
    values = [np.array([_along(run, at, "nelbo", points) for run in arm]) for arm in (ours, theirs)]
    errors = [np.array([_along(run, at, "nelbo_se", points) for run in arm]) for arm in (ours, theirs)]
    tokens = np.mean([_along(run, at, "tokens", points) for run in theirs], axis=0)
    rows = []
    for place, point in enumerate(points):
        gap, low, high = contrasts.welch(values[0][:, place], values[1][:, place])
        if min(len(ours), len(theirs)) < 2:
            half = Z95 * np.sqrt(sum((error[:, place] ** 2).mean() / len(error) for error in errors))
            low, high = gap - half, gap + half
        told = {"at": at, "share": point / most, "tokens": tokens[place], "gap": gap, "low": low, "high": high}
        rows.append(told | {"n_seeds": len(ours), "n_seeds_against": len(theirs)})
    return rows


def _along(run: pd.DataFrame, at: str, value: str, points: np.ndarray) -> np.ndarray:
    return np.interp(np.log(points), np.log(run[at].to_numpy(float)), run[value].to_numpy(float))


def contrasts_table(nll: pd.DataFrame, solve: pd.DataFrame) -> pd.DataFrame:
    """Differences of arms over training seeds, with Welch's 95% interval; NaN bounds for one seed.

    Each arm at S_max of its own training, of which `nll` tells. The 2 x 2 of looping and of masked-to-masked
    attention in the middle layer stands as four differences.
    """
    pairs = (*PAIRS, ("base-isolated", "base"), ("loop-isolated", "loop"), ("loop-isolated", "base-isolated"))
    rows, s_max = [], nll.groupby(["task", "arm"])["max_loops"].first()
    for task, frame, measure, value in (
        *((task, part, "test NELBO", "nll") for task, part in nll.groupby("task")),
        *((task, part, "one-shot", "solve_rate") for task, part in solve.groupby("task")),
    ):
        for arm, against in pairs:
            if {arm, against} <= set(frame["arm"]):
                ours, theirs = (
                    frame[(frame["arm"] == name) & (frame["n_loops"] == s_max[task, name])][value].to_numpy()
                    for name in (arm, against)
                )
                difference = contrasts.welch(ours, theirs)
                rows.append((task, measure, arm, against, ours.mean(), theirs.mean(), *difference,
                             len(ours), len(theirs)))  # fmt: skip
    columns = ["task", "measure", "arm", "against", "value", "value_against", "difference", "low", "high",
               "n_seeds", "n_seeds_against"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)
