"""Walking through a model once while any number of reducers watch its attention, and sums by application.

A pattern lives as long as its layer application: what reducers keep are small sums, so memory grows neither
with the loops nor with the sequences. `PlaceSums` is what most reducers are: a `Moments` per application.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.attention.groups import Seen, States
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.hooked import HookedLoopMDM
from loopmdm_model.masking import MaskedBatch
from loopmdm_model.moments import Moments
from loopmdm_model.names import parse_loop

Names = Callable[[str], bool]


class Reducer(Protocol):
    """What watches a walk."""

    needs_values: bool

    def begin(self, states: States) -> None:
        """A batch starts."""
        ...

    def see(self, seen: Seen) -> None:
        """One layer application of it."""
        ...


@torch.no_grad()
def walk(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int,
    reducers: Sequence[Reducer],
    clusters: np.ndarray | None = None,
    where: Names = lambda name: True,  # noqa: ARG005
    readout: bool = True,
) -> None:
    """One forward of a batch; each application whose prefix is in `where` is shown to every reducer.

    Without `readout` coda and unembedding are not run.
    """
    states, values = States.of(m, b, clusters), {}
    for reducer in reducers:
        reducer.begin(states)

    def keep(value: Tensor, hook: object) -> None:
        values[_prefix(hook)] = value

    def show(pattern: Tensor, hook: object) -> None:
        prefix = _prefix(hook)
        seen = Seen(prefix, layer_of(prefix), parse_loop(prefix), pattern, values.pop(prefix, None), states)
        for reducer in reducers:
            reducer.see(seen)

    hooks = [(_leaf("hook_pattern", where), show)]
    if any(reducer.needs_values for reducer in reducers):
        hooks.append((_leaf("hook_v", where), keep))
    with m.hooks(fwd_hooks=hooks):
        if readout:
            m(b.tokens, n_loops=n_loops, attention_mask=b.attention_mask)
            return
        for _ in m.states(b.tokens, n_loops, b.attention_mask):
            pass


def chunks(b: MaskedBatch, clusters: np.ndarray | None, batch_size: int):
    """Parts of a batch with their clusters and the index of their first sequence."""
    for start in range(0, len(b), check_count("batch_size", batch_size)):
        span = slice(start, start + batch_size)
        yield b.rows(span), None if clusters is None else clusters[span], start


def in_loops(loops: Sequence[int]) -> Names:
    """Whether a prefix belongs to one of these loops."""
    return lambda prefix: parse_loop(prefix) in loops


def _leaf(leaf: str, where: Names) -> Names:
    return lambda name: name.endswith(f"attn.{leaf}") and where(name.rpartition("attn.")[0])


def _prefix(hook: object) -> str:
    return str(getattr(hook, "name", "")).rpartition("attn.")[0]


def layer_of(prefix: str) -> int:
    """The physical layer of an application's prefix, as in "loop.2.blocks.1."."""
    return int(prefix.split(".")[-2])


class PlaceSums:
    """Moments per layer application, filled batch by batch; shards `merge` to the whole.

    Subclasses turn an application into vectors [sequence, head, .., k] (`vectors`) and moments into columns
    (`frame`). `by_head` False averages the heads first.
    """

    needs_values = False

    def __init__(self, m: HookedLoopMDM, n_loops: int | None = None, by_head: bool = True):
        self.m, self.by_head = m, by_head
        self.n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
        self.moments: dict[str, Moments] = {}
        self.hidden = self.could = 0

    def add(self, b: MaskedBatch, clusters: np.ndarray | None = None) -> Self:
        """Run the model on a batch and take it in; `clusters` [batch] names the documents."""
        walk(self.m, b, self.n_loops, [self], clusters)
        return self

    def begin(self, states: States) -> None:
        """Count what is masked."""
        self.hidden += states.hidden
        self.could += states.could

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

    def vectors(self, seen: Seen) -> Tensor | None:
        """Vectors [sequence, head, .., k], NaN where a sequence does not count; None: skip the application."""
        raise NotImplementedError

    def merge(self, other: Self) -> Self:
        """Take in another shard of the same measure."""
        for what in ("n_loops", "by_head"):
            if getattr(self, what) != getattr(other, what):
                raise UsageError(f"shards differ in {what}: {getattr(self, what)} and {getattr(other, what)}")
        if type(self) is not type(other) or self.m.cfg != other.m.cfg:
            raise UsageError("shards must come from the same measure and the same model")
        for prefix, moments in other.moments.items():
            self.moments.setdefault(prefix, Moments()).merge(moments)
        self.hidden, self.could = self.hidden + other.hidden, self.could + other.could
        return self

    @property
    def mask_ratio(self) -> float:
        """Realised share of maskable positions that were masked."""
        return self.hidden / self.could if self.could else float("nan")

    def frame(self) -> pd.DataFrame:
        """One row per application, head and whatever `columns` holds."""
        if not self.moments:
            raise UsageError("nothing was measured yet; add at least one batch")
        parts = [self._rows(prefix, self.columns(moments)) for prefix, moments in self.moments.items()]
        return pd.concat(parts, ignore_index=True)

    def columns(self, moments: Moments) -> dict[str, np.ndarray]:
        """Columns [head, *groups] of one application."""
        raise NotImplementedError

    def groups(self) -> dict[str, Sequence[str]]:
        """Names of the axes after `head`, with their labels."""
        raise NotImplementedError

    def _rows(self, prefix: str, columns: dict[str, np.ndarray]) -> pd.DataFrame:
        layer, loop, groups = layer_of(prefix), parse_loop(prefix), self.groups()
        n_heads = next(iter(columns.values())).shape[0]
        grid = pd.MultiIndex.from_product([range(n_heads), *groups.values()])
        values = {name: np.broadcast_to(value, columns_shape(n_heads, groups)) for name, value in columns.items()}
        frame = pd.DataFrame({name: value.reshape(-1) for name, value in values.items()})
        heads = grid.get_level_values(0) if self.by_head else [None] * len(frame)
        place = {
            "n_loops": self.n_loops,
            "segment": self.m.cfg.segment(layer),
            "loop": pd.array([loop] * len(frame), dtype="Int64"),
            "layer": layer,
            "depth": self.m.cfg.depth(layer, loop or 0, self.n_loops),
            "head": pd.array(heads, dtype="Int64"),
        }
        place |= {name: grid.get_level_values(axis + 1) for axis, name in enumerate(groups)}
        return pd.concat([pd.DataFrame(place | {"mask_ratio": self.mask_ratio}, index=frame.index), frame], axis=1)


def columns_shape(n_heads: int, groups: dict[str, Sequence[str]]) -> tuple[int, ...]:
    """Shape of a column before it is laid flat."""
    return n_heads, *(len(labels) for labels in groups.values())


def summed(sums: PlaceSums, b: MaskedBatch, clusters: np.ndarray | None, batch_size: int) -> pd.DataFrame:
    """The frame after a whole batch was added in parts."""
    for part, labels, _ in chunks(b, clusters, batch_size):
        sums.add(part, labels)
    return sums.frame()
