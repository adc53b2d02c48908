"""How far a head's map moves from one loop to the next, on the rows of masked queries.

With A_i the map of a looped layer's head at loop i, for one sequence, then averaged over sequences:

    frobenius         ||A_i - A_{i-1}||_F / ||A_i||_F over the rows of masked queries
    rank_correlation  Spearman's correlation of A_i(q, .) and A_{i-1}(q, .) over the real keys, ties at their mean
                      rank, averaged over masked queries q (rows that are constant in either loop are left out)

Loop 0 has no predecessor: NaN with n = 0. Of every looped layer only the last loop's rows are kept. Ranking sorts
every row and costs more than the forward: it runs on demand. Definitions are ours.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.numbers.moments import Moments
from loopmdm.analysis.watch.groups import Seen, States
from loopmdm.analysis.watch.walk import PlaceSums, summed
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide, width
from loopmdm.model.sequences import MaskedBatch, as_batch


class ChangeSums(PlaceSums):
    """Distances and, with `rank`, rank correlations of successive maps as running moments."""

    needs_pattern = True

    def __init__(
        self, m: HookedLoopMDM, n_loops: int | None = None, rank: bool = False, by_head: bool = True
    ):  # fmt: skip
        super().__init__(m, n_loops, by_head)
        if not m.cfg.layers("loop"):
            raise UsageError("the model has no looped layers, so no maps of successive loops; take a looped model")
        self.rank, self._dtype = rank, width(m.model.dtype)
        self._before: dict[int, Float[Tensor, "head row key"]] = {}  # of masked queries, all sequences in turn
        self._rows: list[Tensor] = []
        self._ranks: dict[int, Tensor] = {}

    def begin(self, states: States) -> None:
        """Make room for the rows of masked queries; before the forward, so that they do not scatter its heap."""
        super().begin(states)
        self._before, self._ranks = {}, {}
        self._rows = [rows.nonzero()[:, 0] for rows in states.members[..., 0]]
        shape = self.m.cfg.n_heads, sum(len(rows) for rows in self._rows), states.real.shape[1]
        for layer in self.m.cfg.layers("loop"):
            self._before[layer] = torch.zeros(shape, dtype=self._dtype, device=states.real.device)

    def vectors(self, seen: Seen) -> Tensor | None:
        """[sequence, head, metric, 1]; each metric has its own gaps."""
        if seen.loop is None:
            return None
        frobenius = self._distance(seen)
        metrics = [frobenius]
        if self.rank:
            ranks = key_ranks(seen.pattern, seen.states.real)
            ranked = self._ranks.get(seen.layer)
            metrics.append(torch.full_like(frobenius, torch.nan) if ranked is None else _agreement(
                ranks, ranked, seen.states))  # fmt: skip
            self._ranks[seen.layer] = ranks
        return torch.stack(metrics, dim=-1)[..., None]

    def _distance(self, seen: Seen) -> Float[Tensor, "batch head"]:
        """Relative distance over masked rows, which then take the place of the last loop's.

        A sequence at a time, so that no second pattern is made.
        """
        distances = []
        kept = self._before[seen.layer].split([len(rows) for rows in self._rows], dim=1)
        for one, rows, before in zip(seen.pattern, self._rows, kept, strict=True):
            now = wide(one.index_select(1, rows))  # [head, masked query, key]
            size = now.square().sum((1, 2)).sqrt()
            moved = (
                before.sub_(now).square_().sum((1, 2)).sqrt() if seen.loop else torch.full_like(size, torch.nan)
            )
            distances.append(moved / size)  # 0 / 0 without masked queries: NaN
            before.copy_(now)
        return torch.stack(distances)

    def merge(self, other: "ChangeSums") -> "ChangeSums":
        """Take in another shard of the same measure."""
        if self.rank != other.rank:
            raise UsageError("one shard has rank correlations and the other has none; measure them alike")
        return super().merge(other)

    def groups(self) -> dict[str, Sequence[str]]:
        """Metrics."""
        return {"metric": ("frobenius", "rank_correlation")[: 1 + self.rank]}

    def columns(self, moments: Moments) -> dict[str, np.ndarray]:
        """Columns [head, metric]."""
        error = np.sqrt(moments.covariance[..., 0, 0])
        return {"value": moments.mean[..., 0], "standard_error": error, "n": moments.n}


def key_ranks(
    pattern: Float[Tensor, "batch head query key"], real: Tensor
) -> Float[Tensor, "batch head query key"]:  # fmt: skip
    """Rank of every key in its row, ties at their mean rank; padding takes the lowest ranks."""
    rows = wide(pattern).masked_fill(~real[:, None, None], -1.0)
    ordered = rows.sort(dim=-1).values
    below = torch.searchsorted(ordered, rows.contiguous(), right=False)
    upto = torch.searchsorted(ordered, rows, right=True)
    return (below + upto + 1).float() / 2


def _agreement(ranks: Tensor, before: Tensor, states: States) -> Float[Tensor, "batch head"]:
    """Mean over masked queries of the correlation of ranks over real keys."""
    real = states.real[:, None, None].float()
    n_keys = real.sum(-1, keepdim=True)
    x, y = ((r - (r * real).sum(-1, keepdim=True) / n_keys) * real for r in (ranks, before))
    correlation = (x * y).sum(-1) / ((x * x).sum(-1) * (y * y).sum(-1)).sqrt()
    known = states.members[:, None, :, 0] * correlation.isfinite()
    return (correlation.nan_to_num() * known).sum(-1) / known.sum(-1)


def attention_change(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    rank: bool = True,
    by_head: bool = True,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Distance and rank correlation of successive loops' maps, by loop, looped layer and head.

    Columns: n_loops segment loop layer depth head metric mask_ratio value standard_error n. Without `by_head`
    the heads' values are averaged.
    """
    sums = ChangeSums(m, n_loops, rank, by_head)
    return summed(sums, as_batch("attention_change", b, clusters), batch_size)


MEASURES = (
    Measure(
        "attention-change",
        "distance and rank correlation of maps between successive loops",
        plain(attention_change),
        loops=2,
        groupless=plain(attention_change),
        shards=True,
    ),
)
