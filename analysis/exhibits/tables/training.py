"""Tables of training: learning curves, FLOPs to a target, and the contrasts between arms over seeds."""

import math

import pandas as pd

from loopmdm.analysis.measures.quality import efficiency
from loopmdm.analysis.numbers import contrasts
from loopmdm.model.files import read_json_lines
from loopmdm.model.network.checkpoints import METRICS, need, resolve
from loopmdm.model.zoo.runs import Zoo

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
