"""Attention sinks as a further group of keys, chosen on other sequences.

A head's sink at factor f is a position whose mean received attention exceeds f times the mean of the others':

    received(k) = mean over sequences in which k is real of mean over real queries q != k of A(q, k)
    k is a sink   if received(k) > f * mean over other positions j of received(j)

With `by="state"` the means are taken over sequences in which k is masked (clean), and a position may be a sink in
one state only. To choose and to measure on the same sequences would select on the outcome, so sequences (whole
clusters, where given) are split in two halves and each is measured with the other's sinks. The keys are then
self | sink | masked | clean, and their masses still sum to 1. Definitions are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm.analysis.measures.attention.masses import AttentionSums
from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.watch.groups import NOTHING_MORE, TOKEN_GROUPS, KeyGroups, Place, Seen, States
from loopmdm.analysis.watch.sums import Asks
from loopmdm.analysis.watch.walk import walk
from loopmdm.model.errors import UsageError, check_count, check_number, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import step_generator
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.sites import at

FACTORS = (3.0, 5.0, 10.0)
SINK_GROUPS = ("sink", "masked", "clean")
By = Literal["position", "state"]


class ReceivedSums:
    """Mean attention received by each position, by its state; a reducer of sums that merge.

    `total` [head, pos, state] by application and `count` [pos, state], state = masked, clean.
    """

    needs_values = False
    needs_pattern = False

    def __init__(self):
        self.total: dict[str, Tensor] = {}
        self.count: Tensor | None = None

    def begin(self, states: States) -> None:
        """Count sequences in which a position is masked or clean."""
        count = states.members.double().sum(0).cpu()
        self.count = count if self.count is None else self.count + self._alike(count)

    def asks(self, place: Place) -> Asks:  # noqa: ARG002
        """Nothing beside received masses."""
        return NOTHING_MORE

    def see(self, seen: Seen) -> None:
        """Add what each key receives from other real queries."""
        sizes = seen.states.members.sum(1)[:, None, :, None]
        members = seen.states.members[:, None]
        others = (seen.sums.others * sizes).sum(2)
        queries = (seen.states.real.sum(-1) - 1).clamp(min=1)[:, None, None]
        total = ((others / queries)[..., None] * members).double().sum(0).cpu()
        self.total[seen.prefix] = total + self.total.get(seen.prefix, 0)

    def merge(self, other: "ReceivedSums") -> "ReceivedSums":
        """Take in another shard."""
        if other.count is not None:
            self.count = other.count if self.count is None else self.count + self._alike(other.count)
        for prefix, total in other.total.items():
            self.total[prefix] = total + self.total.get(prefix, 0)
        return self

    def _alike(self, count: Tensor) -> Tensor:
        assert self.count is not None
        if count.shape != self.count.shape:
            raise UsageError(
                f"sinks are positions: all sequences must have one length, got {len(count)} and {len(self.count)}"
            )
        return count

    def sinks(self, factor: float, by: By = "position") -> "Sinks":
        """The sinks at a factor."""
        check_word("by", by, get_args(By))
        check_number("factor", factor, 0, above=True)
        if self.count is None:
            raise UsageError("sinks were looked for in no sequence; add at least one batch")
        return Sinks({prefix: self._found(total, factor, by) for prefix, total in self.total.items()})

    def _found(self, total: Tensor, factor: float, by: By) -> Tensor:
        count = self.count
        assert count is not None
        if by == "position":
            total, count = total.sum(-1, keepdim=True), count.sum(-1, keepdim=True)
        known = (count > 0).expand_as(total)
        mean = torch.where(known, total / count.clamp(min=1), 0.0)
        n_others = known.sum(1, keepdim=True) - 1
        others = (mean.sum(1, keepdim=True) - mean) / n_others
        return (known & (mean > factor * others)).expand(-1, -1, 2)


@dataclass(frozen=True)
class Sinks:
    """Which positions are sinks: by application [head, pos, state], state = masked, clean."""

    places: dict[str, Tensor]

    def members(self, place: Place) -> Tensor:
        """[batch, head, key, sink | masked | clean]."""
        places = self.places[place.prefix].to(place.states.real.device)
        if places.shape[1] != place.states.real.shape[1]:
            raise UsageError(
                f"sinks were chosen on {places.shape[1]} positions, these sequences have "
                f"{place.states.real.shape[1]}; choose them on sequences of the same length"
            )
        groups = place.states.members[:, None].expand(-1, places.shape[0], -1, -1)
        sink = groups * places
        return torch.cat([sink.sum(-1, keepdim=True), groups - sink], dim=-1)

    @property
    def groups(self) -> KeyGroups:
        """Keys as self | sink | masked | clean."""
        return KeyGroups(SINK_GROUPS, self.members)


def halves(owners: np.ndarray, seed: int) -> np.ndarray:
    """A random half of the sequences, [n] boolean; those of one owner stay together. Both halves need a unit."""
    labels = np.unique(owners, return_inverse=True)[1]
    units = int(labels.max()) + 1
    if units < 2:
        raise UsageError(f"two halves need at least two independent sequences (or clusters), got {units}")
    chosen = step_generator(seed, "order", 1).permutation(units)[: units // 2]
    return np.isin(labels, chosen)


def received_attention(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    batch_size: int = 32,
    loops: Sequence[int] | None = None,
) -> ReceivedSums:
    """What each position receives at every application, or in some loops only; `.sinks(factor)` chooses."""
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    sums = ReceivedSums()
    for _, part in as_batch("received_attention", b).batches(batch_size):
        if loops is None:
            walk(m, part, n_loops, [sums])
        else:
            walk(m, part, n_loops, [sums], at(loop=loops))
    return sums


def sink_attention(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    factors: tuple[float, ...] = FACTORS,
    by: By = "position",
    content: bool = False,
    by_head: bool = True,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """As `mask_attention`, with keys self | sink | masked | clean, at several factors.

    Its columns and `factor`, `by`, `n_sinks` (mean number of sinks a head has at that application). Sinks of one
    half of the sequences are measured on the other, so every sequence counts once. log_odds leave sinks out.
    """
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    b = as_batch("sink_attention", b, clusters)
    if not factors:
        raise UsageError("factors is empty; name at least one, as in factors=(3, 5, 10)")
    first = torch.from_numpy(halves(b.owners, seed))
    whole: list[AttentionSums] = []
    numbers: list[list[Sinks]] = [[] for _ in factors]
    for half in (first, ~first):
        found = received_attention(m, b.rows(~half), n_loops, batch_size)
        chosen = [found.sinks(factor, by) for factor in factors]
        sums = [AttentionSums(m, n_loops, content, by_head, sinks.groups) for sinks in chosen]
        for _, part in b.rows(half).batches(batch_size):
            walk(m, part, n_loops, sums)
        whole = [one.merge(other) for one, other in zip(whole, sums, strict=True)] if whole else sums
        for place, sinks in enumerate(chosen):
            numbers[place].append(sinks)
    frames = [
        one.frame().assign(factor=float(factor), by=by, n_sinks=_numbers(one, some))
        for one, factor, some in zip(whole, factors, numbers, strict=True)
    ]
    return pd.concat(frames, ignore_index=True)


def _numbers(sums: AttentionSums, halves_sinks: list[Sinks]) -> np.ndarray:
    """Mean number of sinks of each row's application and head, in the order of the frame."""
    columns = []
    for prefix in sums.moments:
        counts = torch.stack([s.places[prefix].any(-1).sum(-1).double() for s in halves_sinks]).mean(0)
        counts = counts if sums.by_head else counts.mean(0, keepdim=True)
        columns.append(np.repeat(counts.numpy(), len(TOKEN_GROUPS) * len(sums.keys.all_names)))
    return np.concatenate(columns)


MEASURES = (
    Measure("attention-sinks", "masses with sinks as a group, at three factors", plain(sink_attention), version=2),
)
