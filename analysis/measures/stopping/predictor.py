"""A small predictor of what is still to gain, used as a stopping rule at a price per FLOP.

After loop i a ridge regression maps cheap features x_i (standardised; with squares and products with the mask
ratio) to the gains of going on to every later loop j:

    g_ij = loss_i - loss_j,   W_i = (X'X + penalty I)^-1 X'G_i

and the sequence goes on as long as some j is worth its FLOPs: max_j [ g_ij(x) - price * (C_j - C_i) ] > 0.
Features: mask ratio; log of the relative change and of the second difference of the state; entropy and best
probability under the direct lens, whose unembedding at every loop is paid for. "state" features are free, "lens"
means all of them. The penalty is that of the least leave-one-out error. Definitions are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.analysis.measures.stopping.controls import prices
from loopmdm.analysis.measures.stopping.frontier import Contest, check_pair
from loopmdm.analysis.measures.stopping.record import LoopRecord
from loopmdm.model.errors import UsageError, check_count, check_word
from loopmdm.model.information import entropy
from loopmdm.model.precision import wide
from loopmdm.model.stopping.halting import spread
from loopmdm.model.stopping.rules import Lens, LoopView, SecondDifference, StateDelta, StoppingRule

Features = Literal["state", "lens"]
NAMES = {"state": ("state-delta", "second-difference"), "lens": ("DirectEntropy", "DirectBest")}
LOGARITHMIC = ("state-delta", "second-difference")
PENALTIES = tuple(10.0**k for k in range(-2, 5))
LEAST_ROWS = 20


@dataclass(frozen=True)
class DirectEntropy(StoppingRule):
    """Entropy in nats of what the state itself says, unembedded directly: a feature, not a change."""

    positions: Literal["all", "masked"] = field(default="masked", kw_only=True)

    @property
    def reads(self) -> Lens:
        """It unembeds the state."""
        return "direct"

    def values(self, view: LoopView) -> Tensor:
        """Per position of the group, NaN elsewhere."""
        return self._spread(view, lambda logits: entropy(wide(logits).log_softmax(-1)))

    def _spread(self, view: LoopView, number) -> Tensor:
        rows = self.group(view.masked, view.real)
        assert view.read is not None
        return spread(number(view.read("direct", rows)), rows)


@dataclass(frozen=True)
class DirectBest(DirectEntropy):
    """Probability of the best token under the direct lens."""

    def values(self, view: LoopView) -> Tensor:
        """Per position of the group, NaN elsewhere."""
        return self._spread(view, lambda logits: wide(logits).softmax(-1).amax(-1))


def feature_rules(max_loops: int) -> list[StoppingRule]:
    """What `record_loops` has to record for the predictor."""
    state: list[StoppingRule] = [
        kind(max_loops=max_loops, positions="masked") for kind in (StateDelta, SecondDifference)
    ]
    return [*state, DirectEntropy(max_loops=max_loops), DirectBest(max_loops=max_loops)]


@dataclass(frozen=True)
class _Ridge:
    """One loop's regression: columns that exist there, their centre and scale, weights [column, later loop]."""

    columns: np.ndarray
    centre: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    mean: np.ndarray

    @classmethod
    def fit(cls, x: Float[np.ndarray, "row column"], gains: Float[np.ndarray, "row later"]) -> "_Ridge":
        columns = np.flatnonzero(np.isfinite(x).all(0))
        x = x[:, columns]
        centre, scale = x.mean(0), np.where(x.std(0) > 1e-9, x.std(0), np.inf)
        z, mean = (x - centre) / scale, gains.mean(0)
        u, s, vt = np.linalg.svd(z, full_matrices=False)
        errors = []
        for penalty in PENALTIES:
            shrunk = s**2 / (s**2 + penalty)
            leverage = (u**2 * shrunk).sum(1) + 1 / len(z)
            left = gains - mean - u @ (shrunk[:, None] * (u.T @ (gains - mean)))
            errors.append(float(((left / (1 - leverage[:, None]).clip(1e-6)) ** 2).mean()))
        best = PENALTIES[int(np.argmin(errors))]
        weights = vt.T @ ((s / (s**2 + best))[:, None] * (u.T @ (gains - mean)))
        return cls(columns, centre, scale, weights, mean)

    def __call__(self, x: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row later"]:
        known = np.where(np.isfinite(x[:, self.columns]), x[:, self.columns], self.centre)
        return (known - self.centre) / self.scale @ self.weights + self.mean


@dataclass(frozen=True)
class GainPredictor:
    """Regressions for loops 0..S_max - 2, fitted on one record."""

    features: Features
    ridges: tuple[_Ridge, ...]

    @classmethod
    def fit(cls, fitted: LoopRecord, features: Features = "lens") -> "GainPredictor":
        """Needs a record of at least two loops and 20 rows with `feature_rules`."""
        if fitted.max_loops < 2:
            raise UsageError("with one loop there is nothing to gain; record at least max_loops=2")
        if len(fitted.n_masked) < LEAST_ROWS:
            raise UsageError(
                f"a predictor needs at least {LEAST_ROWS} masked sequences, got {len(fitted.n_masked)}; "
                "raise n_samples or give more"
            )
        losses = fitted.losses.numpy()
        ridges = [
            _Ridge.fit(features_at(fitted, loop, features), (losses[loop] - losses[loop + 1 :]).T)
            for loop in range(fitted.max_loops - 1)
        ]
        return cls(features, tuple(ridges))

    def gains(self, record: LoopRecord, loop: int) -> Float[np.ndarray, "row later"]:
        """Predicted loss after `loop` less that after each later one."""
        return self.ridges[loop](features_at(record, loop, self.features))

    def cost(self, record: LoopRecord) -> Float[Tensor, "loop row"]:
        """FLOPs of stopping after each loop, the features' reading included."""
        return record.flops(DirectEntropy(max_loops=record.max_loops) if self.features == "lens" else None)

    def loops(self, record: LoopRecord, price: float) -> Int[Tensor, " row"]:
        """Loops of each row when a FLOP costs `price` nats."""
        cost = self.cost(record).numpy()
        used = np.full(cost.shape[1], record.max_loops)
        for loop in reversed(range(record.max_loops - 1)):
            worth = self.gains(record, loop) - price * (cost[loop + 1 :] - cost[loop]).T
            used[worth.max(1) <= 0] = loop + 1
        return torch.from_numpy(used)


def features_at(record: LoopRecord, loop: int, features: Features = "lens") -> Float[np.ndarray, "row column"]:
    """What is known of each row after `loop`, the noise that the model sees first; NaN where it does not exist."""
    check_word("features", features, tuple(NAMES))
    values = {}
    for name in _names(features):
        if name not in record.criteria:
            raise UsageError(
                f"the record lacks {name}; make it with record_loops(m, data, feature_rules(max_loops))"
            )
        values[name] = record.criteria[name][loop].double().numpy()
    return _columns(record.noise.numpy(), values)


def _names(features: Features) -> tuple[str, ...]:
    return NAMES["state"] + (NAMES["lens"] if features == "lens" else ())


def _columns(ratio: np.ndarray, values: dict[str, np.ndarray]) -> Float[np.ndarray, "row column"]:
    """Mask ratio and its square; each feature, its square and its product with the mask ratio."""
    parts = [ratio, ratio**2]
    for name, value in values.items():
        feature = np.log(np.maximum(value, 1e-12)) if name in LOGARITHMIC else value
        parts += [feature, feature**2, feature * ratio]
    return np.stack(parts, axis=1)


@dataclass(frozen=True)
class PredictedGain(StoppingRule):
    """Stop where no later loop is worth its FLOPs at `price` nats each, by a fitted predictor, while sampling.

    The criterion is the largest predicted net gain in nats, 0 where it is negative; `threshold` is what it has to
    exceed. It was fitted on masked data: along a sampler's own trajectory it extrapolates.
    """

    predictor: GainPredictor = field(kw_only=True)
    price: float = field(default=0.0, kw_only=True)
    loop_flops: float = field(kw_only=True)
    """FLOPs of one more loop, what is read after it included."""
    positions: Literal["all", "masked"] = field(default="masked", kw_only=True)

    @classmethod
    def of(cls, predictor: GainPredictor, record: LoopRecord, price: float, max_loops: int = 0) -> "PredictedGain":
        """At `price`, with the mean cost of a loop on `record`; `max_loops` is at most what was fitted."""
        most = len(predictor.ridges) + 1
        if max_loops > most:
            raise UsageError(f"the predictor was fitted on {most} loops; max_loops may be {most} at most")
        cost = predictor.cost(record).mean(1)
        step = float((cost[-1] - cost[0]) / (len(cost) - 1))
        return cls(predictor=predictor, price=price, loop_flops=step, max_loops=max_loops or most)

    @property
    def reads(self) -> Lens | None:
        """What the predictor's features need."""
        return "direct" if self.predictor.features == "lens" else None

    def criterion(self, view: LoopView) -> Tensor:
        """Net gain in nats, [batch]."""
        if self.scope == "token":
            raise UsageError('the predictor knows whole sequences; scope "token" does not apply')
        if view.loop >= self.max_loops - 1:
            return torch.zeros(len(view.state), device=view.state.device)
        values = {}
        for rule in feature_rules(self.max_loops):
            name = RECORDED[type(rule)]
            if name in _names(self.predictor.features):
                value = rule.values(view)
                assert value is not None
                value = rule.reduce(value, self.group(view.masked, view.real))
                values[name] = value.double().detach().cpu().numpy()
        real = view.real.sum(-1).double()
        ratio = ((view.masked & view.real).sum(-1).double() / real).cpu().numpy()
        gains = self.predictor.ridges[view.loop](_columns(ratio, values))[:, : self.max_loops - 1 - view.loop]
        net = gains - self.price * self.loop_flops * np.arange(1, gains.shape[1] + 1)
        return torch.from_numpy(net.max(1).clip(0)).to(view.state.device)

    def calm(self, criterion: Tensor) -> Tensor:
        """Where nothing is left to gain."""
        return criterion <= self.threshold


RECORDED = {
    StateDelta: "state-delta",
    SecondDifference: "second-difference",
    DirectEntropy: "DirectEntropy",
    DirectBest: "DirectBest",
}


def predictor_frontier(
    record: LoopRecord, fitted: LoopRecord, n_prices: int = 20, features: Sequence[Features] = ("state", "lens")
) -> pd.DataFrame:
    """Predictors fitted on `fitted` (validation), used as stopping rules on `record` (test), by replay.

    Rules "predictor state" and "predictor lens"; `threshold` is the price in nats per FLOP; columns as in
    `stopping_frontier`, against_schedule being the mask-ratio schedule fitted on the same record.
    """
    check_pair(record, fitted)
    check_count("n_prices", n_prices)
    contest, rows = Contest.of(record, fitted), []
    for kind in features:
        predictor = GainPredictor.fit(fitted, kind)
        for price in prices(fitted, n_prices):
            rows += contest.rows(
                f"predictor {kind}", price, predictor.loops(record, price), predictor.cost(record)
            )
    return pd.DataFrame(rows)


def prediction_quality(
    record: LoopRecord, fitted: LoopRecord, features: Sequence[Features] = ("state", "lens")
) -> pd.DataFrame:
    """How well the gain still to come, from each loop to the last, is foreseen on `record`.

    Columns: features loop r2 (1 - mean squared error / variance; 0 is no better than the mean over `record`, and
    it can be negative) rank_correlation n; NaN where the gain does not vary.
    """
    from scipy import stats as distributions  # late: half a second

    check_pair(record, fitted)
    rows = []
    for kind in features:
        predictor = GainPredictor.fit(fitted, kind)
        for loop in range(record.max_loops - 1):
            true = (record.losses[loop] - record.losses[-1]).numpy()
            guess = predictor.gains(record, loop)[:, -1]
            flat = len(true) < 2 or np.ptp(true) == 0 or np.ptp(guess) == 0
            r2 = float("nan") if flat else 1 - float(((true - guess) ** 2).mean() / true.var())
            rank = float("nan") if flat else float(distributions.spearmanr(guess, true).statistic)
            rows.append((kind, loop, r2, rank, len(true)))
    return pd.DataFrame(rows, columns=["features", "loop", "r2", "rank_correlation", "n"])
