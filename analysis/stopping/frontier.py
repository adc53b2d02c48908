"""Quality against FLOPs for all rules and thresholds, off one record, with controls and the oracle."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.stopping.record import LoopRecord, noise_schedule, record_loops
from loopmdm_model import stats
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.masking import MaskedBatch
from loopmdm_model.model import LoopedModel
from loopmdm_model.stopping import StoppingRule, oracle_loops

N_BINS = 5


def stopping_frontier(
    m: LoopedModel,
    data: Tensor | MaskedBatch,
    rules: Sequence[StoppingRule] | None = None,
    n_thresholds: int = 20,
    max_loops: int | None = None,
    validation: Tensor | MaskedBatch | None = None,
    n_samples: int = 2,
    maskable: Tensor | None = None,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Each rule at thresholds spread over its criterion's range on `validation` (default: `data` itself).

    Besides the rules: "fixed" (every S), "noise-schedule" (loops by mask ratio, fitted on validation) and
    "oracle" (looks at the answer). Columns: rule threshold mask_ratio (bin's middle; NaN: all) mean_loops flops
    (a sequence, the rule's own reading included) nll nll_se accuracy; against_fixed: nll less that of fixed S at
    equal FLOPs (a mixture of two neighbours), against_shuffled: less that of the rule's own loop counts shuffled
    over sequences within bins of mask ratio, each paired, with _se; n rows. Below 0 the rule is better; one that
    is not below 0 on both spends its loops no better than chance would.
    """
    check_count("n_thresholds", n_thresholds)
    options: dict[str, Any] = {"n_samples": n_samples, "batch_size": batch_size}
    record = record_loops(m, data, rules, max_loops, maskable=maskable, clusters=clusters, seed=seed, **options)
    fitted = record
    if validation is not None:
        fitted = record_loops(m, validation, rules, max_loops, maskable=maskable, seed=seed + 1, **options)
    return frontier(record, fitted, n_thresholds)


def frontier(record: LoopRecord, fitted: LoopRecord, n_thresholds: int = 20) -> pd.DataFrame:
    """As `stopping_frontier`, from records: thresholds and schedules from `fitted`, numbers from `record`."""
    if record.max_loops != fitted.max_loops or record.rules.keys() != fitted.rules.keys():
        raise UsageError("the two records differ in max_loops or rules; make both with the same")
    rows = []
    for loops in range(1, record.max_loops + 1):
        rows += _rows(record, "fixed", loops, torch.full_like(record.n_masked, loops), record.flops())
    for name, rule in record.rules.items():
        for threshold in thresholds(fitted, name, n_thresholds):
            used = stopped_at(record, name, threshold)
            rows += _rows(record, name, threshold, used, record.flops(rule))
    for price in _prices(fitted, n_thresholds):
        schedule = noise_schedule(fitted, price, N_BINS)
        place = _bins(record)
        used = torch.tensor(schedule.loops)[place]
        rows += _rows(record, "noise-schedule", price, used, record.flops())
        used = oracle_loops(record.losses, record.flops().mean(1), price)
        rows += _rows(record, "oracle", price, used, record.flops())
    return pd.DataFrame(rows)


def thresholds(record: LoopRecord, name: str, n: int) -> list[float]:
    """`n` quantiles of a rule's criterion over loops and rows, distinct, so that few and many loops both occur."""
    values = record.criteria[name]
    known = values[torch.isfinite(values)].numpy()
    if not len(known):
        raise UsageError(f"{name}: its criterion exists nowhere in {record.max_loops} loops; raise max_loops")
    quantiles = np.quantile(known, np.linspace(0, 1, n + 2)[1:-1])
    return sorted({float(value) * (1 + 1e-6) + 1e-12 for value in quantiles})  # above it also in 32 bits


def stopped_at(record: LoopRecord, name: str, threshold: float) -> Tensor:
    """Loops [row] that the rule would have run at another threshold."""
    rule = replace(record.rules[name], threshold=threshold, max_loops=record.max_loops)
    return rule.replay(record.criteria[name])


def _prices(record: LoopRecord, n: int) -> list[float]:
    """Nats per FLOP from "all loops" to "one loop", on a logarithmic scale."""
    step = float(record.flops()[1:].mean() - record.flops()[:-1].mean()) if record.max_loops > 1 else 1.0
    return [float(price) for price in np.logspace(-4, 0.5, n) / max(step, 1.0)]


def _bins(record: LoopRecord) -> Tensor:
    return (record.mask_ratio * N_BINS).ceil().long().sub(1).clamp(0, N_BINS - 1)


def _rows(record: LoopRecord, name: str, threshold: float, used: Tensor, cost: Tensor) -> list[dict]:
    place = _bins(record)
    losses, spent = record.at(record.losses, used), record.at(cost.expand_as(record.losses), used)
    correct = record.at(record.correct, used)
    shuffled = losses - _shuffled(record, used, place)
    rows = []
    for number in (None, *range(N_BINS)):
        member = torch.ones_like(place, dtype=torch.bool) if number is None else place == number
        if not member.any():
            continue
        mean = float(spent[member].mean())
        fixed = losses[member] - _fixed_at(record, mean, member)
        owner = record.clusters[member.numpy()]
        row = {
            "rule": name, "threshold": float(threshold),
            "mask_ratio": float("nan") if number is None else (number + 0.5) / N_BINS,
            "mean_loops": float(used[member].double().mean()), "flops": mean,
        }  # fmt: skip
        for label, values in (("nll", losses[member]), ("accuracy", correct[member]), ("against_fixed", fixed),
                              ("against_shuffled", shuffled[member])):  # fmt: skip
            centre, error, n = stats.mean_and_error(values.numpy(), owner)
            row |= {label: float(centre), f"{label}_se": float(error), "n": int(n)}
        rows.append(row)
    return rows


def _fixed_at(record: LoopRecord, flops: float, member: Tensor) -> Tensor:
    """Loss [row] of a mixture of two fixed S that costs `flops` on average; the nearest S beyond the ends."""
    cost = record.flops()[:, member].mean(1).numpy()
    place = float(np.interp(flops, cost, np.arange(len(cost))))
    low = min(int(place), len(cost) - 1)
    high, share = min(low + 1, len(cost) - 1), place - low
    losses = record.losses[:, member]
    return (1 - share) * losses[low] + share * losses[high]


def _shuffled(record: LoopRecord, used: Tensor, place: Tensor) -> Tensor:
    """Expected loss [row] if the rule's counts were handed out at random within the row's bin: exact."""
    expected = torch.zeros_like(record.losses[0])
    for number in place.unique():
        member = place == number
        counts = torch.bincount(used[member] - 1, minlength=record.max_loops).double()
        expected[member] = (counts / counts.sum()) @ record.losses[:, member]
    return expected
