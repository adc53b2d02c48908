"""Verdicts on stopping: non-inferiority to all loops, and whether a criterion knows what is still to gain."""

import numpy as np
import pandas as pd
import torch
from scipy import stats as distributions

from analysis.stopping.frontier import stopped_at, thresholds
from analysis.stopping.record import LoopRecord
from loopmdm_model import stats


def noninferiority(
    record: LoopRecord, fitted: LoopRecord, rule: str, margin: float = 0.05, n_thresholds: int = 20
) -> dict:
    """How few loops a rule needs so that the loss is not inferior to that of all loops.

    The threshold is the largest that passes on `fitted` (validation); the verdict is on `record` (test): the
    one-sided 97.5% bound on the loss increase over S_max lies below `margin` x (NLL(S = 1) - NLL(S_max)).
    "undecided" where looping itself gains nothing measurable: then there is nothing to lose.
    """
    chosen = None
    for threshold in thresholds(fitted, rule, n_thresholds):
        if _passes(fitted, rule, threshold, margin)["passes"]:
            chosen = threshold
    if chosen is None:
        chosen = 0.0
    found = _passes(record, rule, chosen, margin)
    verdict = "supported" if found["passes"] else "not supported"
    if not found["gain"] > stats.Z95 * found["gain_se"]:
        verdict = "undecided"
    return {"rule": rule, "threshold": chosen, "verdict": verdict} | found


def _passes(record: LoopRecord, rule: str, threshold: float, margin: float) -> dict:
    used = stopped_at(record, rule, threshold)
    increase = (record.at(record.losses, used) - record.losses[-1]).numpy()
    gains = (record.losses[0] - record.losses[-1]).numpy()
    mean, error, n = stats.mean_and_error(increase, record.clusters)
    gain, gain_se, _ = stats.mean_and_error(gains, record.clusters)
    units = len(np.unique(record.clusters))
    slack, slack_se, _ = stats.mean_and_error(increase - margin * gains, record.clusters)
    bound = slack + distributions.t.ppf(0.975, units - 1) * slack_se if units > 1 else float("nan")
    return {
        "mean_loops": float(used.double().mean()), "of_loops": record.max_loops, "increase": float(mean),
        "increase_se": float(error), "gain": float(gain), "gain_se": float(gain_se),
        "bound": float(bound), "passes": bool(bound < 0), "n": int(n),
    }  # fmt: skip


def calibration(record: LoopRecord, rule: str, n_bins: int = 5) -> pd.DataFrame:
    """What is still to gain, loss after this loop less loss after the last, by bin of a rule's criterion.

    Columns: rule loop bin criterion remaining remaining_se n, and `rank_correlation` of criterion and remaining
    gain over the rows of the loop: a criterion worth stopping on has it well above 0.
    """
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
