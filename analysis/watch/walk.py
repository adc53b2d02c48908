"""Walking through a model once while any number of reducers watch its attention, and sums by application.

What reducers keep are small sums, so memory grows neither with the loops nor with the sequences. Sums over a
pattern are taken from its rows while attention is computed (`tiles.py`), and no pattern is made; where one is made
anyway (hooks on scores or patterns, a pinned explicit path, a reducer that needs it) they are taken from that.
`PlaceSums` is what most reducers are: a `Moments` per application.
"""

import math
from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm.analysis.numbers.moments import Moments, Plain
from loopmdm.analysis.watch.groups import NOTHING_MORE, Place, Seen, States, pattern_sums
from loopmdm.analysis.watch.sums import Asks, PatternSums
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.hooks.scopes import Hooks
from loopmdm.model.layout import By
from loopmdm.model.precision import check_state
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.sites import Filter, Site, at
from loopmdm.model.tiles import Asked, attend

Sums = TypeVar("Sums", bound="PlaceSums")


EVERYWHERE = at()


@runtime_checkable
class Reducer(Protocol):
    """What watches a walk."""

    needs_values: bool
    needs_pattern: bool

    def begin(self, states: States) -> None:
        """A batch starts."""
        ...

    def asks(self, place: Place) -> Asks:
        """What it wants summed at a layer application beside own and received masses."""
        ...

    def see(self, seen: Seen) -> None:
        """One layer application of it."""
        ...


class Watcher:
    """The hook at the patterns of one walk: shown a pattern, or computing attention if nobody makes one."""

    def __init__(self, states: States, reducers: Sequence[Reducer]):
        self.states, self.reducers = states, reducers
        self.values: dict[str, Tensor] = {}

    def keep(self, value: Tensor, hook: object) -> None:
        """Remember values [batch, key, head, d_head] until their pattern comes."""
        self.values[_site(hook).prefix] = value

    def __call__(self, pattern: Tensor, hook: object) -> None:
        """Sum a pattern [batch, head, query, key] that was made."""
        site = _site(hook)
        rows = pattern.sum(-1).transpose(1, 2)  # one pass; not finite where anything in a row is not
        check_state(rows, self.states.real, f"{site.prefix}attn.hook_pattern")
        place, asks = self._place(site)
        value = self.values.pop(site.prefix, None)
        self._show(place, pattern_sums(self.states, pattern, value, asks), pattern)

    def attend(self, asked: Asked, hook: object) -> Tensor:
        """Compute z [batch, head, query, d_head], and sum on the way."""
        site = _site(hook)
        place, asks = self._place(site)
        self.values.pop(site.prefix, None)
        value = asked.value if any(ask.moved for ask in asks) else None
        sums = PatternSums(self.states.queries, asked.query.shape[1], asks, value, asked.value.dtype)
        z = attend(asked, sums.see)
        # A softmax is finite in all of its row or nowhere.
        check_state(sums.own.transpose(1, 2), self.states.real, f"{site.prefix}attn.hook_pattern")
        self._show(place, sums, None)
        return z

    def _place(self, site: Site) -> tuple[Place, list[Asks]]:
        assert site.layer is not None
        place = Place(site.prefix, site.layer, site.loop, self.states)
        return place, [reducer.asks(place) for reducer in self.reducers]

    def _show(self, place: Place, sums: PatternSums, pattern: Tensor | None) -> None:
        for reducer, content in zip(self.reducers, sums.contents, strict=True):
            reducer.see(Seen(**vars(place), sums=sums, content=content, given=pattern))


@torch.no_grad()
def walk(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int,
    reducers: Sequence[Reducer],
    where: Filter = EVERYWHERE,
    by: By = "holds",
) -> None:
    """One forward of a batch; each application in `where` is shown to every reducer, queries grouped `by`.

    Where no coda layer is, coda and unembedding are not run. NotFiniteError for patterns, states or logits that
    are not finite: to a reducer a NaN is a sequence without such queries.
    """
    states = States.of(m, b, by)
    for reducer in reducers:
        reducer.begin(states)

    watcher = Watcher(states, reducers)
    needed = any(reducer.needs_pattern for reducer in reducers)  # a plain hook at the pattern has it made
    hooks: Hooks = [(where & at(leaf="pattern"), watcher.__call__ if needed else watcher)]
    if any(reducer.needs_values for reducer in reducers):
        hooks.append((where & at(leaf="v"), watcher.keep))
    with m.hooks(fwd_hooks=hooks):
        for state, context in m.states(b.tokens, n_loops, b.attention_mask):
            last = state, context
        if any(where.holds(Site(None, layer, "pattern")) for layer in m.cfg.layers("coda")):
            for _ in m.read(*last, rows=states.real):
                """Logits are checked as they are made."""


def _site(hook: object) -> Site:
    return Site.parse(getattr(hook, "name", ""))


class PlaceSums:
    """Moments per layer application, filled batch by batch; shards `merge` to the whole.

    Subclasses turn an application into vectors [sequence, head, .., k] (`vectors`) and moments into columns
    (`frame`). `by_head` False averages the heads first.
    """

    needs_values = False
    needs_pattern = False
    by: By = "holds"

    def __init__(self, m: HookedLoopMDM, n_loops: int | None = None, by_head: bool = True):
        self.m, self.by_head = m, by_head
        self.n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
        self.moments: dict[str, Moments] = {}
        self.hidden = self.could = 0

    def add(self: Sums, b: MaskedBatch, clusters: np.ndarray | None = None) -> Sums:
        """Run the model on a batch and take it in; `clusters` [batch] names the documents."""
        walk(self.m, as_batch(type(self).__name__, b, clusters), self.n_loops, [self], by=self.by)
        return self

    def begin(self, states: States) -> None:
        """Count what is masked."""
        self.hidden += states.hidden
        self.could += states.could

    def asks(self, place: Place) -> Asks:  # noqa: ARG002
        """Nothing beside own and received masses."""
        return NOTHING_MORE

    def see(self, seen: Seen) -> None:
        """Take in one application of a batch."""
        vectors = self.vectors(seen)
        if vectors is not None:
            self.take(seen.prefix, vectors, seen.states.clusters)

    def take(self, prefix: str, vectors: Tensor, clusters: np.ndarray | None) -> None:
        """Add vectors [sequence, head, .., k] to the moments of an application."""
        values = vectors.double().cpu().numpy()
        values = values if self.by_head else values.mean(axis=1, keepdims=True)
        self.moments.setdefault(prefix, Moments()).add(values, clusters)

    def of(self, b: MaskedBatch) -> tuple[dict[str, Plain], int, int]:
        """What a batch alone adds: moments by application as plain arrays, and what is masked and maskable."""
        alone = copy(self)
        alone.moments, alone.hidden, alone.could = {}, 0, 0
        alone.add(b)
        return {prefix: one.plain() for prefix, one in alone.moments.items()}, alone.hidden, alone.could

    def take_in(self, moments: dict[str, Plain], hidden: int, could: int) -> None:
        """Add what `of` gave."""
        for prefix, one in moments.items():
            self.moments.setdefault(prefix, Moments()).merge(Moments.of(*one))
        self.hidden, self.could = self.hidden + hidden, self.could + could

    def vectors(self, seen: Seen) -> Tensor | None:
        """Vectors [sequence, head, .., k], NaN where a sequence does not count; None: skip the application."""
        raise NotImplementedError

    def merge(self: Sums, other: Sums) -> Sums:
        """Take in another shard of the same measure."""
        for what in ("n_loops", "by_head", "by"):
            if getattr(self, what) != getattr(other, what):
                raise UsageError(f"shards differ in {what}: {getattr(self, what)} and {getattr(other, what)}")
        if type(self) is not type(other) or self.m.cfg != other.m.cfg:
            raise UsageError("shards must come from the same measure and the same model")
        self.take_in({prefix: one.plain() for prefix, one in other.moments.items()}, other.hidden, other.could)
        return self

    @property
    def mask_ratio(self) -> float:
        """Realised share of maskable positions that were masked."""
        return self.hidden / self.could if self.could else float("nan")

    def frame(self) -> pd.DataFrame:
        """One row per application, head and whatever `columns` holds."""
        if not self.moments:
            raise UsageError("nothing was measured yet; add at least one batch")
        parts = [self.columns(moments) for moments in self.moments.values()]
        n_heads = next(iter(parts[0].values())).shape[0]
        shape = n_heads, *(len(labels) for labels in self.groups().values())
        values = {
            name: np.concatenate([np.broadcast_to(part[name], shape).reshape(-1) for part in parts])
            for name in parts[0]
        }
        frame = pd.DataFrame(self._places(shape) | {"mask_ratio": self.mask_ratio} | values)
        return frame if self.by == "holds" else frame.assign(by=self.by)

    def columns(self, moments: Moments) -> dict[str, np.ndarray]:
        """Columns [head, *groups] of one application."""
        raise NotImplementedError

    def groups(self) -> dict[str, Sequence[str]]:
        """Names of the axes after `head`, with their labels."""
        raise NotImplementedError

    def _places(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Columns that say where each row was measured, for all applications in turn."""
        cfg, size = self.m.cfg, math.prod(shape)
        places = [Site.parse(f"{prefix}hook_resid_pre") for prefix in self.moments]
        layers, loops = [site.layer for site in places], [site.loop for site in places]
        depths = [cfg.depth(layer, loop or 0, self.n_loops) for layer, loop in zip(layers, loops, strict=True)]
        index = np.tile(np.indices(shape).reshape(len(shape), -1), len(layers))
        place = {
            "n_loops": self.n_loops,
            "segment": np.repeat([cfg.segment(layer) for layer in layers], size),
            "loop": pd.array(loops, dtype="Int64").repeat(size),
            "layer": np.repeat(layers, size),
            "depth": np.repeat(depths, size),
            "head": pd.array(index[0] if self.by_head else [None] * index.shape[1], dtype="Int64"),
        }
        groups = enumerate(self.groups().items(), start=1)
        return place | {name: np.array(labels)[index[axis]] for axis, (name, labels) in groups}


def summed(sums: PlaceSums, b: MaskedBatch, batch_size: int) -> pd.DataFrame:
    """The frame after a whole batch was added in parts."""
    for _, _, found in b.each(batch_size, sums.of):
        sums.take_in(*found)
    return sums.frame()
