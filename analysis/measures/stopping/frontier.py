"""Quality against FLOPs for all rules and thresholds, off one record, with controls and the oracle."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm.analysis.measures.stopping.controls import Ladder, best_schedules, fitted_schedules, shuffled
from loopmdm.analysis.measures.stopping.record import Data, LoopRecord, as_data, noise_bins, record
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import Read
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.stopping.rules import StoppingRule, oracle_loops

N_BINS = 5


def stopping_frontier(
    m: LoopedModel,
    data: Tensor | Data,
    rules: Sequence[StoppingRule] | None = None,
    n_thresholds: int = 20,
    max_loops: int | None = None,
    validation: Tensor | Data | None = None,
    n_samples: int = 2,
    maskable: Tensor | None = None,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Each rule at thresholds spread over its criterion's range on `validation` (default: `data` itself).

    Besides the rules: "fixed" (every S), "noise-schedule" (loops by mask ratio, fitted on validation) and
    "oracle" (looks at the answer). Columns: rule threshold mask_ratio (bin's middle; NaN: all) mean_loops flops
    (a sequence, the rule's own reading included) nll accuracy; against_fixed and against_schedule: nll less that
    of fixed S and of the mask-ratio schedule at equal FLOPs (a mixture of two neighbours); against_shuffled: less
    that of the rule's own loop counts shuffled over sequences within bins of mask ratio; all paired, each with
    _se; n rows in n_units sequences or clusters. Below 0 the rule is better; one that is not below 0 on all three
    spends its loops no better than something simpler would. Bins without rows are NaN with n = 0.
    """
    check_count("n_thresholds", n_thresholds)
    read = Read(max_loops, None, n_samples, seed, batch_size)
    judged = record(m, as_data(m, data, maskable, clusters), rules, read)
    fitted = judged
    if validation is not None:
        fitted = record(m, as_data(m, validation, maskable), rules, replace(read, seed=seed + 1))
    return frontier(judged, fitted, n_thresholds)


def frontier(record: LoopRecord, fitted: LoopRecord, n_thresholds: int = 20) -> pd.DataFrame:
    """As `stopping_frontier`, from records: thresholds and schedules from `fitted`, numbers from `record`."""
    check_pair(record, fitted)
    contest = Contest.of(record, fitted)
    rows = []
    for loops in range(1, record.max_loops + 1):
        rows += contest.rows("fixed", float(loops), torch.full_like(record.n_masked, loops))
    for name, rule in record.rules.items():
        for threshold in thresholds(fitted, name, n_thresholds):
            rows += contest.rows(name, threshold, stopped_at(record, name, threshold), record.flops(rule))
    place = noise_bins(record, N_BINS)
    for price, schedule in fitted_schedules(fitted, n_thresholds, N_BINS):
        rows += contest.rows("noise-schedule", price, torch.tensor(schedule.loops)[place])
        rows += contest.rows("oracle", price, oracle_loops(record.losses, record.flops().mean(1), price))
    return pd.DataFrame(rows)


def check_pair(record: LoopRecord, fitted: LoopRecord) -> None:
    """UsageError unless the two records tell of the same rules over the same loops."""
    if record.max_loops != fitted.max_loops or record.rules.keys() != fitted.rules.keys():
        raise UsageError("the two records differ in max_loops or rules; make both with the same")


def thresholds(record: LoopRecord, name: str, n: int) -> list[float]:
    """About `n` quantiles of a rule's criterion over loops and rows, distinct, so that few and many loops occur.

    Each lies halfway between two values that occurred: rounding does not decide who stops.
    """
    values = record.criteria[name]
    known = values[torch.isfinite(values)].double().numpy()
    if not len(known):
        raise UsageError(f"{name}: its criterion exists nowhere in {record.max_loops} loops; raise max_loops")
    found = np.unique(known)
    between = np.append((found[:-1] + found[1:]) / 2, found[-1] * (1 + 1e-6) + 1e-12)
    place = np.searchsorted(found, np.quantile(known, np.linspace(0, 1, n + 2)[1:-1]), side="right") - 1
    return between[np.unique(place)].tolist()


def stopped_at(record: LoopRecord, name: str, threshold: float) -> Tensor:
    """Loops [row] that the rule would have run at another threshold."""
    rule = replace(record.rules[name], threshold=threshold, max_loops=record.max_loops)
    return rule.replay(record.criteria[name])


@dataclass(frozen=True)
class Group:
    """Rows that are reported together: all of them (`mask_ratio` NaN), or a bin's."""

    mask_ratio: float
    member: np.ndarray
    clusters: np.ndarray
    n_units: int
    ladders: dict[str, Ladder]


@dataclass(frozen=True)
class Contest:
    """A record with its controls, before which any number of loop counts can be brought."""

    record: LoopRecord
    place: Tensor
    groups: list[Group]

    @classmethod
    def of(cls, record: LoopRecord, fitted: LoopRecord) -> "Contest":
        """The control "schedule" is the best that `fitted` knows at any price."""
        place = (record.mask_ratio * N_BINS).ceil().long().sub(1).clamp(0, N_BINS - 1)
        counts = [torch.tensor(plan)[noise_bins(record, N_BINS)] for plan in best_schedules(fitted, N_BINS)]
        cost, owner = record.flops(), np.unique(record.clusters, return_inverse=True)[1]
        ladders = {
            "fixed": (record.losses.numpy(), cost.numpy()),
            "schedule": tuple(
                torch.stack([record.at(values, used) for used in counts]).numpy()
                for values in (record.losses, cost)
            ),
        }
        groups = []
        for number in (None, *range(N_BINS)):
            member = np.flatnonzero(np.ones(len(place)) if number is None else (place == number).numpy())
            pairs = ladders.items() if len(member) else ()
            own = {name: Ladder(losses[:, member], costs[:, member]) for name, (losses, costs) in pairs}
            middle = float("nan") if number is None else (number + 0.5) / N_BINS
            units = len(np.unique(owner[member]))
            groups.append(Group(middle, member, owner[member], units, own))
        return cls(record, place, groups)

    def rows(self, name: str, threshold: float, used: Tensor, cost: Tensor | None = None) -> list[dict[str, Any]]:
        """One row a group for the loop counts `used` [row]; `cost` [loop, row] defaults to that of fixed S."""
        record = self.record
        spent = record.at(record.flops() if cost is None else cost, used).numpy()
        losses, correct = record.at(record.losses, used).numpy(), record.at(record.correct, used).numpy()
        chance = losses - shuffled(record, used, self.place).numpy()
        loops, rows = used.double().numpy(), []
        for group in self.groups:
            member = group.member
            values = {"nll": losses[member], "accuracy": correct[member]}
            for control, ladder in group.ladders.items():
                values[f"against_{control}"] = ladder.against(losses[member], spent[member])
            values["against_shuffled"] = chance[member]
            row = {"rule": name, "threshold": float(threshold), "mask_ratio": group.mask_ratio}
            row |= {"mean_loops": _mean(loops[member]), "flops": _mean(spent[member])}
            if not len(member):
                rows.append(row | {"n": 0, "n_units": 0})
                continue
            means, errors, n = stats.mean_and_error(np.stack(list(values.values()), axis=1), group.clusters)
            for place, label in enumerate(values):
                row |= {label: float(means[place]), f"{label}_se": float(errors[place])}
            rows.append(row | {"n": int(n[0]), "n_units": group.n_units})
        return rows


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
