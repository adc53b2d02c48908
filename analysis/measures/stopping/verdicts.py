"""Verdicts on stopping: non-inferiority to all loops, use beyond the controls, what a criterion knows.

Thresholds are chosen on validation and judged on test. A verdict reads an interval: it says yes or no where the
interval lies on one side, and "undecided" where it does not, or where looping gains nothing measurable.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from loopmdm.analysis.measures.stopping.frontier import frontier, stopped_at, thresholds
from loopmdm.analysis.measures.stopping.record import LoopRecord
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError

CONTROLS = ("fixed", "schedule", "shuffled")
"""What adaptive stopping has to beat at equal FLOPs."""
SCHEDULE = "noise-schedule"
NO_RULES = ("fixed", SCHEDULE, "oracle")


def noninferiority(
    record: LoopRecord, fitted: LoopRecord, rule: str, margin: float = 0.05, n_thresholds: int = 20
) -> dict:
    """How few loops a rule needs so that the loss is not inferior to that of all loops.

    The threshold is the largest that passes on `fitted` (validation), or the smallest if none does; the verdict is
    on `record` (test). `slack` is the loss increase over S_max less `margin` x (NLL(S = 1) - NLL(S_max)), with the
    interval `low`..`bound` (two-sided 95%, so that `bound` is the one-sided 97.5% bound). "supported" if it lies
    below 0, "not supported" if above, else "undecided"; "undecided" also where looping gains nothing measurable:
    then there is nothing to lose. `flops_share` is the rule's cost, its reading included, by that of S_max:
    fewer loops need not be cheaper.
    """
    tried = thresholds(fitted, rule, n_thresholds)
    passed = [threshold for threshold in tried if _against_all(fitted, rule, threshold, margin)["bound"] < 0]
    chosen = max(passed) if passed else min(tried)
    found = _against_all(record, rule, chosen, margin)
    verdict = "supported" if found["bound"] < 0 else "not supported" if found["low"] > 0 else "undecided"
    units = len(np.unique(record.clusters))
    if not found["gain"] > stats.t95(units) * found["gain_se"]:
        verdict = "undecided"
    return {"rule": rule, "threshold": chosen, "passed_validation": bool(passed), "verdict": verdict} | found


def _against_all(record: LoopRecord, rule: str, threshold: float, margin: float) -> dict:
    used = stopped_at(record, rule, threshold)
    increase = (record.at(record.losses, used) - record.losses[-1]).numpy()
    gains = (record.losses[0] - record.losses[-1]).numpy()
    columns = np.stack([used.double().numpy(), increase, gains, increase - margin * gains], axis=1)
    (loops, loss, gain, slack), (loops_se, loss_se, gain_se, slack_se), n = stats.mean_and_error(
        columns, record.clusters
    )
    half = stats.t95(len(np.unique(record.clusters))) * slack_se
    share = record.at(record.flops(record.rules[rule]), used).mean() / record.flops()[-1].mean()
    return {
        "mean_loops": float(loops), "mean_loops_se": float(loops_se), "of_loops": record.max_loops,
        "flops_share": float(share), "increase": float(loss), "increase_se": float(loss_se), "gain": float(gain),
        "gain_se": float(gain_se), "slack": float(slack), "low": float(slack - half), "bound": float(slack + half),
        "n": int(n[0]),
    }  # fmt: skip


def usefulness(
    record: LoopRecord, fitted: LoopRecord, n_thresholds: int = 20, margin: float = 0.01, schedule: bool = False
) -> pd.DataFrame:
    """Whether each rule spends its FLOPs better than fixed S, a mask-ratio schedule, and its own counts shuffled.

    As `judge_usefulness`, from records: thresholds are chosen on `fitted` (validation) and judged on `record`
    (test); an advantage below `margin` x (NLL(S = 1) - NLL(S_max)) counts as none. With `schedule` the last row is
    the schedule by mask ratio, against fixed S alone.
    """
    gains = (record.losses[0] - record.losses[-1]).numpy()
    least = max(0.0, margin * float(gains.mean()))
    chosen = None if fitted is record else frontier(fitted, fitted, n_thresholds)
    table = frontier(record, fitted, n_thresholds)
    judged = judge_usefulness(table, chosen, least)
    return pd.concat([judged, judge_schedule(table, chosen, least)], ignore_index=True) if schedule else judged


def judge_schedule(table: pd.DataFrame, chosen: pd.DataFrame | None = None, least: float = 0.0) -> pd.DataFrame:
    """As `judge_usefulness`, of loops scheduled by mask ratio alone, which have one control: fixed S."""
    return _judged(table, chosen, least, [SCHEDULE], ("fixed",))


def judge_usefulness(table: pd.DataFrame, chosen: pd.DataFrame | None = None, least: float = 0.0) -> pd.DataFrame:
    """A verdict per rule from a frontier on test, and the frontier of the same thresholds on validation.

    Of each rule the threshold is taken at which the worst of the three contrasts is lowest on `chosen` (contrast +
    standard error). "not useful": one of them shows that less than `least` nats are won over that control (its 95%
    interval lies above -least); "useful": all three intervals lie below 0 on `table` (all must, so no correction
    among them), and none shows so little; else "undecided". Without `chosen` the threshold is taken on `table`
    itself and its intervals are Bonferroni's over the rule's thresholds. `n_useful` counts the thresholds, of
    `n_thresholds`, that are useful by Bonferroni's intervals on `table`.

    Columns: rule threshold mean_loops flops nll verdict, per control against_ _se _low _high; n_useful
    n_thresholds n n_units.
    """
    rules = [rule for rule in table["rule"].unique() if rule not in NO_RULES]
    return _judged(table, chosen, least, rules, CONTROLS)


def _judged(
    table: pd.DataFrame, chosen: pd.DataFrame | None, least: float, rules: list[str], controls: Sequence[str]
) -> pd.DataFrame:
    rows = []
    whole = table[table["mask_ratio"].isna() & table["rule"].isin(rules)]
    for rule, part in whole.groupby("rule", sort=False):
        seen = part if chosen is None else chosen[chosen["mask_ratio"].isna() & (chosen["rule"] == rule)]
        seen = seen[seen["threshold"].isin(part["threshold"])]
        if not len(seen):
            raise UsageError(f"{rule}: the two frontiers share no threshold; make both with the same `fitted`")
        worst = np.max([seen[f"against_{name}"] + seen[f"against_{name}_se"] for name in controls], axis=0)
        best = seen["threshold"].iloc[int(np.argmin(np.where(np.isfinite(worst), worst, np.inf)))]
        row = part[part["threshold"] == best].iloc[0]
        many = [_verdict(other, least, len(part), controls)[0] for _, other in part.iterrows()]
        verdict, bounds = _verdict(row, least, len(part) if chosen is None else 1, controls)
        kept = {name: row[name] for name in ("rule", "threshold", "mean_loops", "flops", "nll")}
        rows.append(kept | {"verdict": verdict} | bounds | {
            "n_useful": many.count("useful"), "n_thresholds": len(part),
            "n": int(row["n"]), "n_units": int(row["n_units"]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _verdict(row: pd.Series, least: float, tests: int, controls: Sequence[str]) -> tuple[str, dict[str, float]]:
    units = int(row["n_units"])
    half = stats.t95(units, tests)
    bounds: dict[str, float] = {}
    for name in controls:
        value, error = float(row[f"against_{name}"]), float(row[f"against_{name}_se"])
        bounds |= {f"against_{name}": value, f"against_{name}_se": error}
        bounds |= {f"against_{name}_low": value - half * error, f"against_{name}_high": value + half * error}
    if any(bounds[f"against_{name}_low"] >= -least for name in controls):
        return "not useful", bounds
    if all(bounds[f"against_{name}_high"] < 0 for name in controls):
        return "useful", bounds
    return "undecided", bounds


def calibration(record: LoopRecord, rule: str, n_bins: int = 5) -> pd.DataFrame:
    """What is still to gain, loss after this loop less loss after the last, by bin of a rule's criterion.

    Columns: rule loop bin criterion remaining remaining_se n, and `rank_correlation` of criterion and remaining
    gain over the rows of the loop: a criterion worth stopping on has it well above 0.
    """
    from scipy import stats as distributions  # late: half a second

    rows = []
    for loop in range(record.max_loops - 1):
        values = record.criteria[rule][loop].numpy()
        known = np.isfinite(values)
        if known.sum() < 2:
            continue
        remaining = (record.losses[loop] - record.losses[-1]).numpy()
        flat = np.ptp(values[known]) == 0 or np.ptp(remaining[known]) == 0
        rank = float("nan") if flat else distributions.spearmanr(values[known], remaining[known]).statistic
        ranks = torch.from_numpy(distributions.rankdata(values[known], method="ordinal") - 1)
        place = (ranks * n_bins / known.sum()).long().numpy()
        for number in range(n_bins):
            member = np.flatnonzero(known)[place == number]
            if not len(member):
                continue
            mean, error, n = stats.mean_and_error(remaining[member], record.clusters[member])
            rows.append((rule, loop, number, float(values[member].mean()), float(mean), float(error), float(rank),
                         int(n)))  # fmt: skip
    columns = ["rule", "loop", "bin", "criterion", "remaining", "remaining_se", "rank_correlation", "n"]
    return pd.DataFrame(rows, columns=columns)
