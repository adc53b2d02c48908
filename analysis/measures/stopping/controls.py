"""What a stopping rule has to beat at equal cost: a ladder of alternatives, and its own counts shuffled.

A ladder holds alternatives of rising cost on the same rows (fixed S = 1, 2, ..; mask-ratio schedules from cheap to
dear). A rule that costs c on average is compared with the mixture of the two neighbouring rungs that costs c on
average; beyond the ends with the nearest rung, which for a rule dearer than all of them leaves money unspent.
The share w of the mixture is estimated, too: with D = mean loss - mean mixed loss, the influence of row r is

    loss_r - mixed_r - slope * (cost_r - mixed cost_r),   slope = (L_high - L_low) / (C_high - C_low)

whose mean is D, as the mixture costs the same. Definitions are ours.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.analysis.measures.stopping.record import LoopRecord, noise_bins, noise_schedule
from loopmdm.model.stopping.rules import NoiseSchedule


@dataclass(frozen=True)
class Ladder:
    """Alternatives on the same rows: `losses` and `costs`, both [rung, row], of rising mean cost."""

    losses: Float[np.ndarray, "rung row"]
    costs: Float[np.ndarray, "rung row"]

    def __post_init__(self):
        """Drop rungs that cost no more than the one before; keep the means."""
        assert self.losses.shape == self.costs.shape
        mean = self.costs.mean(1)
        rises = np.append(True, mean[1:] > np.maximum.accumulate(mean)[:-1])
        for name in ("losses", "costs"):
            object.__setattr__(self, name, getattr(self, name)[rises])
        object.__setattr__(self, "_means", (self.losses.mean(1), self.costs.mean(1)))

    def against(self, losses: Float[np.ndarray, " row"], costs: Float[np.ndarray, " row"]) -> np.ndarray:
        """Influences [row] on mean loss less that of the mixture of equal mean cost; their mean is that."""
        loss_of, cost_of = self._means  # pyright: ignore[reportAttributeAccessIssue]
        place = float(np.interp(costs.mean(), cost_of, np.arange(len(cost_of))))
        low = min(int(place), len(cost_of) - 1)
        share = place - low
        difference = losses - self.losses[low]
        if share == 0:
            return difference
        high = low + 1
        slope = (loss_of[high] - loss_of[low]) / (cost_of[high] - cost_of[low])
        mixed_cost = (1 - share) * self.costs[low] + share * self.costs[high]
        return difference - share * (self.losses[high] - self.losses[low]) - slope * (costs - mixed_cost)


def shuffled(record: LoopRecord, used: Int[Tensor, " row"], place: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Expected loss [row] if the counts `used` were handed out at random within the row's bin `place`: exact."""
    expected = torch.zeros_like(record.losses[0])
    for number in place.unique():
        member = place == number
        counts = torch.bincount(used[member] - 1, minlength=record.max_loops).double()
        expected[member] = (counts / counts.sum()) @ record.losses[:, member]
    return expected


def fixed_loops(record: LoopRecord) -> Ladder:
    """S = 1, 2, .., each for all rows."""
    return Ladder(record.losses.numpy(), record.flops().numpy())


def prices(record: LoopRecord, n: int) -> list[float]:
    """Nats per FLOP from "all loops" to "one loop", on a logarithmic scale."""
    step = float(record.flops()[1:].mean() - record.flops()[:-1].mean()) if record.max_loops > 1 else 1.0
    return [float(price) for price in np.logspace(-4, 0.5, n) / max(step, 1.0)]


def fitted_schedules(fitted: LoopRecord, n_prices: int, n_bins: int) -> list[tuple[float, NoiseSchedule]]:
    """(price, schedule) from dear to cheap FLOPs, fitted on validation."""
    return [
        (price, noise_schedule(fitted, price, n_bins)) for price in sorted(prices(fitted, n_prices), reverse=True)
    ]


def best_schedules(fitted: LoopRecord, n_bins: int) -> list[tuple[int, ...]]:
    """Every schedule that is best at some price on `fitted`, from cheap to dear.

    The whole path, not a grid of prices, which could pass good ones over and make a weak control: prices lie
    between all those at which a bin's best count can change.
    """
    place, cost = noise_bins(fitted, n_bins), fitted.flops()
    bends = {0.0}
    for number in place.unique():
        loss, spent = (values[:, place == number].mean(1).numpy() for values in (fitted.losses, cost))
        low, high = np.triu_indices(len(loss), 1)
        bends |= set(((loss[low] - loss[high]) / (spent[high] - spent[low])).clip(0).tolist())
    at = np.array(sorted(bends))
    between = [*((at[:-1] + at[1:]) / 2), 2 * at[-1] + 1.0]
    plans = (noise_schedule(fitted, float(price), n_bins).loops for price in reversed(between))
    return list(dict.fromkeys(plans))
