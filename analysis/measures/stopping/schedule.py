"""Loops as a function of the noise level: fitted on validation, judged on test.

At a price per FLOP a schedule gives each bin of the noise level the loops that minimise mean loss + price * FLOPs;
prices from high to low make it a frontier. It knows nothing of the sequence but its share of masked tokens, so
whatever looks at more has to beat it. Definitions are ours.
"""

import pandas as pd
import torch

from loopmdm.analysis.measures.stopping.controls import fitted_schedules
from loopmdm.analysis.measures.stopping.frontier import Contest, check_pair
from loopmdm.analysis.measures.stopping.record import LoopRecord, noise_bins
from loopmdm.model.errors import check_count


def schedule_frontier(record: LoopRecord, fitted: LoopRecord, n_prices: int = 20, n_bins: int = 5) -> pd.DataFrame:
    """Schedules with `n_bins` counts fitted on `fitted`, evaluated on `record`.

    Columns as in `stopping_frontier` (`threshold` is the price in nats per FLOP); `against_fixed` is what it is
    for. `against_schedule` compares with the best schedules of five bins and is 0 where these are five.
    """
    check_pair(record, fitted)
    check_count("n_prices", n_prices)
    contest, rows = Contest.of(record, fitted), []
    place = noise_bins(record, check_count("n_bins", n_bins))
    for price, schedule in fitted_schedules(fitted, n_prices, n_bins):
        rows += contest.rows("noise-schedule", price, torch.tensor(schedule.loops)[place])
    return pd.DataFrame(rows)


def schedules_by_noise(fitted: LoopRecord, n_prices: int = 20, n_bins: int = 5) -> pd.DataFrame:
    """The loops that each price buys at each noise level. Columns: threshold mask_ratio n_loops n.

    `mask_ratio` is the middle of the bin of masked among real tokens, n the rows it was fitted on; a bin with
    n = 0 has the count of its nearest neighbour.
    """
    check_count("n_bins", n_bins)
    counts = torch.bincount(noise_bins(fitted, n_bins), minlength=n_bins).tolist()
    rows = [
        (price, (number + 0.5) / n_bins, loops, counts[number])
        for price, schedule in fitted_schedules(fitted, check_count("n_prices", n_prices), n_bins)
        for number, loops in enumerate(schedule.loops)
    ]
    return pd.DataFrame(rows, columns=["threshold", "mask_ratio", "n_loops", "n"])
