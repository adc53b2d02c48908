"""Groups of queries and keys, and what a pattern is reduced to before anything else.

Queries are masked or clean. For every query the keys are `self` and groups of *others*. With A [query, key]
and w(q, Q) = 1 / |Q| for queries in group Q, one pass over the pattern (`sums.py`) gives

    others(Q, k) = sum over q != k of w(q, Q) A(q, k),      own(q) = A(q, q)

and every group mass follows: mass(Q -> K) = sum over k in K of others(Q, k). Padding is in no group. Definitions
are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.watch.sums import Asks, PatternSums
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import By, asked
from loopmdm.model.precision import wide, width
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tiles import tiles_of

TOKEN_GROUPS = ("masked", "clean")
NOTHING_MORE = Asks()


def members(masked: Tensor, real: Tensor) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Which positions are in each group: those of `TOKEN_GROUPS`, and "any" that are no padding."""
    return {"masked": masked & real, "clean": ~masked & real, "any": real}


@dataclass(frozen=True)
class States:
    """Which positions of a batch hold [MASK] and which are real, [batch, pos]; `clusters` [batch] or None.

    `hidden` and `could` count masked and maskable positions (their ratio is the mask ratio). `by` says how queries
    are grouped (`layout.By`); keys go by what they hold. Numbers are in `dtype`, float32 or wider.
    """

    masked: Bool[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    clusters: np.ndarray | None = None
    hidden: int = 0
    could: int = 0
    by: By = "holds"
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, m: HookedLoopMDM, b: MaskedBatch, by: By = "holds") -> "States":
        """Of a batch that `m` is to read."""
        holds = m.cfg.hidden(b.tokens)
        hidden, could = int(b.masked.sum()), int(b.allowed.sum())
        return cls(holds, b.real, b.clusters, hidden, could, by, width(m.model.dtype))

    @cached_property
    def members(self) -> Float[Tensor, "batch pos 2"]:
        """1 where a position is masked or clean, and real."""
        return self._in_columns(self.masked, self.real)

    @cached_property
    def asking(self) -> Float[Tensor, "batch pos 2"]:
        """1 where a position asks as masked or clean."""
        if self.by == "holds":
            return self.members
        return self._in_columns(*asked(self.masked, self.real, self.by))

    def _in_columns(self, masked: Tensor, real: Tensor) -> Float[Tensor, "batch pos 2"]:
        found = members(masked, real)
        return torch.stack([found[group] for group in TOKEN_GROUPS], dim=-1).to(self.dtype)

    @cached_property
    def queries(self) -> Float[Tensor, "batch pos 2"]:
        """Weights w(q, Q), which average over the queries of a group."""
        return self.asking / self.asking.sum(dim=1, keepdim=True).clamp(min=1)

    @cached_property
    def empty(self) -> Bool[Tensor, "batch 2"]:
        """Where a sequence has no query of a group."""
        return self.asking.sum(dim=1) == 0

    def mean(self, per_query: Float[Tensor, "batch head pos"]) -> Float[Tensor, "batch head 2"]:
        """Mean over each group's queries; NaN where there are none."""
        values = wide(per_query)
        means = torch.einsum("bqg,bhq->bhg", self.queries.to(values.dtype), values)
        return means.masked_fill(self.empty[:, None], float("nan"))


@dataclass(frozen=True)
class Place:
    """Which layer application is seen, of which batch."""

    prefix: str
    layer: int
    loop: int | None
    states: States


@dataclass(frozen=True)
class Seen(Place):
    """One layer application of one batch, while it runs, as one reducer sees it.

    `sums` over its pattern; `content` [batch, head, query, group] where the reducer asked for it; the pattern
    itself, [batch, head, query, key], where a reducer of the walk needs one.
    """

    sums: PatternSums
    content: Float[Tensor, "batch head query group"] | None = None
    given: Float[Tensor, "batch head query key"] | None = None

    @classmethod
    def of(cls, place: Place, pattern: Tensor, value: Tensor | None = None, asks: Asks = NOTHING_MORE) -> "Seen":
        """Of a whole pattern, and of values [batch, key, head, d_head] where content is asked for."""
        sums = pattern_sums(place.states, pattern, value, [asks])
        return cls(**vars(place), sums=sums, content=sums.contents[0], given=pattern)

    @property
    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """The whole pattern, for reducers with `needs_pattern`."""
        assert self.given is not None, "a reducer that reads patterns says so: needs_pattern = True"
        return self.given


def pattern_sums(states: States, pattern: Tensor, value: Tensor | None, asks: Sequence[Asks]) -> PatternSums:
    """The sums of a pattern that stands somewhere; values are [batch, key, head, d_head]."""
    by_head = None if value is None else value.transpose(1, 2)
    sums = PatternSums(states.queries, pattern.shape[1], asks, by_head, pattern.dtype)
    for tile in tiles_of(pattern):
        sums.see(tile)
    return sums


Members = Callable[[Place], Tensor]


@dataclass(frozen=True)
class KeyGroups:
    """How keys are grouped: `names` of the groups of others, `members(place)` [batch, head or 1, key, group]."""

    names: tuple[str, ...]
    members: Members

    @property
    def all_names(self) -> tuple[str, ...]:
        """`self` first, then the groups of others."""
        return "self", *self.names


MASKED_OR_CLEAN = KeyGroups(TOKEN_GROUPS, lambda place: place.states.members[:, None])


def group_masses(seen: Seen, keys: Float[Tensor, "batch one key group"]) -> Float[Tensor, "batch head 2 kinds"]:
    """Masses over self and each group of others; NaN where a sequence has no such query."""
    own, others = seen.sums.own, seen.sums.others
    itself = torch.einsum("bqg,bhq->bhg", seen.states.queries.to(own.dtype), own)[..., None]
    masses = torch.cat([itself, others @ keys.to(own.dtype)], dim=-1)
    return masses.masked_fill(seen.states.empty[:, None, :, None], float("nan"))


def group_chances(states: States, keys: Tensor) -> Float[Tensor, "batch head 2 kinds"]:
    """Mean share of each group among the real keys, per query group: masses of uniform rows."""
    n_keys = states.real.sum(-1).to(states.dtype)[:, None, None, None]
    overlap = torch.einsum("bqg,bhqk->bhgk", states.queries, keys)
    others = (keys.sum(dim=2)[:, :, None] - overlap) / n_keys
    chance = torch.cat([(1 / n_keys).expand(-1, others.shape[1], 2, 1), others], dim=-1)
    return chance.masked_fill(states.empty[:, None, :, None], float("nan"))


def group_contents(seen: Seen) -> Float[Tensor, "batch head 2 kinds"]:
    """Mean norm of sum over K of A (v - mean_K v) W_O; `self` is one key and moves no content: 0."""
    assert seen.content is not None, "a reducer that reads contents asks for them"
    moved = torch.stack([seen.states.mean(norm) for norm in seen.content.unbind(-1)], dim=-1)
    return torch.cat([moved[..., :1] * 0, moved], dim=-1)


def output_gram(m: HookedLoopMDM, layer: int) -> Float[Tensor, "head d_head d_head"]:
    """W_O W_O^T per head; UsageError where more than W_O leads to the stream."""
    m.facts.need("linear_heads", by="content")
    weight = m.model.output_weight(layer)
    per_head = wide(weight).T.unflatten(0, (m.cfg.n_heads, m.cfg.d_head))
    return per_head @ per_head.transpose(-1, -2)
