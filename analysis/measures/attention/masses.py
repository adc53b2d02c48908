"""Attention between masked and clean positions, reduced while the model runs.

For a layer application and head with pattern A [query, key], keys are `self`, `masked` (others) or
`clean` (others), and their masses sum to 1 for every query:

    mass(Q -> K)  = mean over queries in Q of sum over keys in K of A, then over sequences
    chance(Q -> K) = mean share of keys in K among the real keys;  lift = mean mass / mean chance
    log_odds(Q)   = log[(mass_masked / chance_masked) / (mass_clean / chance_clean)], self excluded
    content(Q -> K) = mean norm of sum over K of A (v - mean_K v) W_O

log_odds 0 means that the head does not care whether a key is masked. These definitions are ours;
the paper's are not public. Only running moments per application are kept: memory does not grow with the
sequences, and shards add up to the whole.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.numbers.moments import Moments, propagated
from loopmdm.analysis.watch.groups import (
    MASKED_OR_CLEAN,
    NOTHING_MORE,
    TOKEN_GROUPS,
    KeyGroups,
    Place,
    Seen,
    group_chances,
    group_contents,
    group_masses,
    output_gram,
)
from loopmdm.analysis.watch.sums import Asks, Moved
from loopmdm.analysis.watch.walk import PlaceSums, summed
from loopmdm.model.errors import UsageError, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import By, check_by
from loopmdm.model.sequences import MaskedBatch, as_batch

LOG_ODDS_CAP = math.log(1e6)
"""A float32 pattern resolves about seven digits: beyond this ratio masses are its rounding."""


class AttentionSums(PlaceSums):
    """Masses, chances and contents of groups of keys, as running moments.

    `keys` says how keys are grouped: masked or clean by default. `add` batches, `merge` shards, `frame()` the
    columns of `mask_attention`.
    """

    def __init__(
        self,
        m: HookedLoopMDM,
        n_loops: int | None = None,
        content: bool = True,
        by_head: bool = True,
        keys: KeyGroups = MASKED_OR_CLEAN,
    ):
        self.check(m)
        super().__init__(m, n_loops, by_head)
        self.keys, self.needs_values = keys, content and m.facts.linear_heads
        self._gram: dict[int, Tensor] = {}

    def check(self, m: HookedLoopMDM) -> None:
        """UsageError for a model in which there are no such groups."""
        m.facts.need("masks", "bidirectional", by="attention between masked and clean positions")

    def asks(self, place: Place) -> Asks:
        """Content between the groups of keys, where it is wanted."""
        if not self.needs_values:
            return NOTHING_MORE
        gram = self._gram.setdefault(place.layer, output_gram(self.m, place.layer))
        return Asks(moved=Moved(self.keys.members(place), gram))

    def vectors(self, seen: Seen) -> Tensor:
        """[sequence, head, query group, mass | chance | content of each key group]."""
        keys = self.keys.members(seen)
        mass = group_masses(seen, keys)
        parts = [mass, group_chances(seen.states, keys).expand_as(mass)]
        if self.needs_values:
            parts.append(group_contents(seen))
        return torch.cat(parts, dim=-1)

    def merge(self, other: "AttentionSums") -> "AttentionSums":
        """Take in another shard of the same measure."""
        if self.needs_values != other.needs_values or self.keys.names != other.keys.names:
            raise UsageError("shards differ in content or in their groups of keys; measure them alike")
        return super().merge(other)

    def groups(self) -> dict[str, Sequence[str]]:
        """Query groups by key groups."""
        return {"query_group": TOKEN_GROUPS, "key_group": self.keys.all_names}

    def columns(self, moments: Moments) -> dict[str, np.ndarray]:
        """Columns [head, query group, key group]."""
        table = GroupTable(moments, self.keys.all_names)
        mass, mass_se, chance = table.mean("mass"), table.error("mass"), table.mean("chance")
        with np.errstate(invalid="ignore", divide="ignore"):
            lift = mass / chance
        with_self, with_self_se, lift_with_self = table.with_self()
        log_odds, log_odds_se, capped = table.log_odds()
        columns = {"mass": mass, "mass_se": mass_se, "mass_with_self": with_self}
        columns |= {"chance": chance, "lift": lift, "log_odds": log_odds, "log_odds_se": log_odds_se}
        columns |= {"content": table.mean("content"), "content_se": table.error("content")}
        columns |= {"log_odds_capped": capped, "mass_with_self_se": with_self_se}
        columns |= {"lift_se": table.lift_error(lift), "lift_with_self": lift_with_self}
        if self.by != "holds":  # a query's own key may be of the other group
            columns |= {name: np.full_like(mass, np.nan) for name in columns if "with_self" in name}
        missing, whole = ~(chance > 0), ("log_odds", "log_odds_se", "log_odds_capped")
        columns = {k: v if k in whole else np.where(missing, np.nan, v) for k, v in columns.items()}
        return columns | {"n": np.where(missing, 0, moments.n[..., None])}


class GroupTable:
    """Means and delta-method errors out of the moments of one application, [head, query group, key group]."""

    def __init__(self, moments: Moments, names: Sequence[str]):
        self.moments, self.names, self.size = moments, list(names), len(names)
        self.means = moments.mean
        self.covariance = moments.covariance
        self.has_content = self.means.shape[-1] > 2 * self.size

    def _at(self, quantity: str) -> int:
        return self.size * ("mass", "chance", "content").index(quantity)

    def mean(self, quantity: str) -> np.ndarray:
        """Mean of a quantity in each key group; NaN where content was not asked for."""
        if quantity == "content" and not self.has_content:
            return np.full_like(self.means[..., : self.size], np.nan)
        return self.means[..., self._at(quantity) : self._at(quantity) + self.size]

    def error(self, quantity: str) -> np.ndarray:
        """Its standard error."""
        if quantity == "content" and not self.has_content:
            return np.full_like(self.means[..., : self.size], np.nan)
        variances = np.diagonal(self.covariance, axis1=-2, axis2=-1)
        return np.sqrt(variances[..., self._at(quantity) : self._at(quantity) + self.size])

    def lift_error(self, lift: np.ndarray) -> np.ndarray:
        """Standard error of mean mass / mean chance."""
        errors = []
        chance = self.mean("chance")
        for key in range(self.size):
            with np.errstate(invalid="ignore", divide="ignore"):
                parts = {key: 1 / chance[..., key], self.size + key: -lift[..., key] / chance[..., key]}
            errors.append(self._error(parts))
        return np.stack(errors, axis=-1)

    def with_self(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mass with self where query and key group agree, its error, and the lift of it."""
        mass, error, chance = self.mean("mass").copy(), self.error("mass").copy(), self.mean("chance").copy()
        one = np.ones(mass.shape[:-2])
        for query, name in enumerate(TOKEN_GROUPS):
            key = self.names.index(name)
            mass[..., query, key] += mass[..., query, 0]
            chance[..., query, key] += chance[..., query, 0]
            both = {0: np.stack([one, one], -1), key: np.stack([one, one], -1)}
            error[..., query, key] = self._error(both)[..., query]
        with np.errstate(invalid="ignore", divide="ignore"):
            return mass, error, mass / chance

    def log_odds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-odds, error and capped log-odds of each query group, in its row of masked keys; NaN in the others.

        Log-odds are NaN where a mass vanishes; capped they are +-LOG_ODDS_CAP there, NaN only where a group has
        no keys or both masses vanish.
        """
        above, below = self.names.index("masked"), self.names.index("clean")
        at = {above: 1, self.size + above: -1, below: -1, self.size + below: 1}
        with np.errstate(invalid="ignore", divide="ignore"):
            raw = sum(sign * np.log(self.means[..., place]) for place, sign in at.items())
            error = self._error({place: sign / self.means[..., place] for place, sign in at.items()})
        no_keys = ~((self.means[..., self.size + above] > 0) & (self.means[..., self.size + below] > 0))
        capped = np.where(no_keys, np.nan, np.clip(raw, -LOG_ODDS_CAP, LOG_ODDS_CAP))
        known = np.isfinite(raw)
        columns = np.where(known, raw, np.nan), np.where(known, error, np.nan), capped
        owner = np.arange(self.size) == above
        return tuple(np.where(owner, value[..., None], np.nan) for value in columns)

    def _error(self, parts: dict[int, np.ndarray]) -> np.ndarray:
        places = list(parts)
        gradient = np.stack([np.broadcast_to(parts[p], self.means.shape[:-1]) for p in places], axis=-1)
        return propagated(gradient, self.covariance[..., places, :][..., places])


def mask_attention(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    content: bool = True,
    by_head: bool = True,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
    by: By = "holds",
) -> pd.DataFrame:
    """Masses, chance, lift, log-odds and content by application, head, query and key group.

    Columns: n_loops segment loop layer depth head query_group key_group mask_ratio mass mass_with_self chance
    lift log_odds content n, lift_with_self and log_odds_capped, and standard errors mass_se, mass_with_self_se,
    lift_se, log_odds_se, content_se (over sequences, or over `clusters` [batch] of them). `loop` is missing
    outside the loop; `mass_with_self` adds the self mass where query and key group agree; log_odds, of masked
    against clean keys, stands once a query group, in its row of masked keys, and is NaN in the other rows and
    where a mass vanishes: log_odds_capped is then +-LOG_ODDS_CAP, to which it is also clipped. Empty groups are
    NaN with n = 0. Without `by_head` heads are averaged first and `head` is missing; content is NaN where more
    than W_O leads from heads to the stream (`facts.linear_heads`). Queries and keys of group "masked" are
    positions that hold [MASK]; padding is left out. In a shifted model `by="predicts"` groups queries by the
    token that they predict, the next one; what is counted with self is then NaN, and a column `by` says so.

    >>> df = lm.mask_attention(m, b, n_loops=4, by_head=False)
    >>> masked = df[(df["segment"] == "loop") & (df["query_group"] == "masked")]
    >>> masked.groupby("loop")["mass"].sum().round(3).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    check_model(m, "mask_attention", hooked=True)
    check_by(m.facts, by, "mask_attention")
    sums = AttentionSums(m, n_loops, content, by_head)
    sums.by = by
    return summed(sums, as_batch("mask_attention", b, clusters), batch_size)


class NoGroups(AttentionSums):
    """The same rows for a model in which masked and clean positions are no groups: every number NaN, n = 0."""

    def check(self, m: HookedLoopMDM) -> None:
        """Any model will do."""

    def vectors(self, seen: Seen) -> Tensor:
        """Nothing counts."""
        shape = *seen.sums.own.shape[:2], len(TOKEN_GROUPS), 2 * len(self.keys.all_names)
        return torch.full(shape, torch.nan)


def no_groups(m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None, by_head: bool = True) -> pd.DataFrame:
    """As `mask_attention` of a causal model, or one without [MASK], in a table beside others."""
    return summed(NoGroups(m, n_loops, content=False, by_head=by_head), b.rows(slice(1)), 1)


MEASURES = (
    Measure(
        "mask-attention",
        "masses, chance, lift, log-odds, content by loop, layer, head",
        plain(mask_attention),
        groupless=plain(no_groups),
        both_ways=True,
        shards=True,
        version=2,
    ),
    Measure(
        "mask-attention-pooled",
        "the same, heads averaged",
        plain(mask_attention, by_head=False),
        groupless=plain(no_groups, by_head=False),
        both_ways=True,
        shards=True,
        version=2,
    ),
)
