"""What masked queries do at chosen loops, kept per sequence: for tests and intervals that pair loops.

Arrays are [sequence, loop, layer, head, ..] over the looped layers; sequences without masked queries are NaN.
Only the chosen loops are kept, so the record does not grow with S. No coda is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor

from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.groups import (
    MASKED_OR_CLEAN,
    NOTHING_MORE,
    KeyGroups,
    Place,
    Seen,
    States,
    group_chances,
    group_contents,
    group_masses,
    output_gram,
)
from loopmdm.analysis.watch.sums import Asks, Moved
from loopmdm.analysis.watch.walk import walk
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.sites import at


@dataclass(frozen=True)
class LoopRecord:
    """`mass`, `chance` and `content` [sequence, loop, layer, head, self | group], float64; content may be None."""

    mass: NDArray
    chance: NDArray
    content: NDArray | None
    names: tuple[str, ...]

    def at(self, name: str) -> int:
        """Index of a key group."""
        return self.names.index(name)


class _Watch:
    """The reducer behind `record`."""

    needs_pattern = False

    def __init__(self, m: HookedLoopMDM, keys: KeyGroups, content: bool):
        self.m, self.keys, self.needs_values = m, keys, content
        self.found: dict[tuple[int, int], Tensor] = {}

    def begin(self, states: States) -> None:
        """Nothing to prepare."""

    def asks(self, place: Place) -> Asks:
        """Content between the groups of keys, where it is wanted."""
        if not self.needs_values:
            return NOTHING_MORE
        return Asks(moved=Moved(self.keys.members(place), output_gram(self.m, place.layer)))

    def see(self, seen: Seen) -> None:
        """Keep the group means of masked queries."""
        assert seen.loop is not None
        keys = self.keys.members(seen)
        mass = group_masses(seen, keys)
        parts = [mass, group_chances(seen.states, keys).expand_as(mass)]
        if self.needs_values:
            parts.append(group_contents(seen))
        self.found[seen.loop, seen.layer] = torch.stack(parts)[:, :, :, 0].double().cpu()


def check_loops(m: HookedLoopMDM, n_loops: int | None) -> int:
    """The number of loops; refuses fewer than two, or a model that has no looped layers."""
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    if not m.cfg.layers("loop"):
        raise UsageError("the model has no looped layers, so nothing can change over loops; take a looped model")
    if n_loops < 2:
        raise UsageError(f"a change over loops needs n_loops of at least 2, got {n_loops}")
    return n_loops


def record(
    m: HookedLoopMDM,
    b: MaskedBatch,
    loops: Sequence[int],
    keys: KeyGroups = MASKED_OR_CLEAN,
    content: bool = False,
    batch_size: int = 32,
) -> LoopRecord:
    """Walk through the batch once, as far as the chosen loops need, and keep these."""

    def work(part: MaskedBatch) -> Tensor:
        watch = _Watch(m, keys, content)
        walk(m, part, max(loops) + 1, [watch], at(loop=loops))
        by_loop = [[watch.found[loop, layer] for layer in m.cfg.layers("loop")] for loop in loops]
        return torch.stack([torch.stack(row) for row in by_loop])  # [loop, layer, quantity, sequence, ..]

    parts = [found for _, _, found in b.each(batch_size, work)]
    whole = torch.cat(parts, dim=3).permute(2, 3, 0, 1, 4, 5).numpy()
    return LoopRecord(whole[0], whole[1], whole[2] if content else None, keys.all_names)


def log_odds_growth(masked: NDArray, clean: NDArray) -> tuple[NDArray, NDArray]:
    """Last less first log-odds [..] of masses [sequence, loop, ..], and each sequence's influence on it.

    The chances are the same at both loops and cancel. NaN where a mass vanishes.
    """
    parts = ((masked, -1, 1), (clean, -1, -1), (masked, 0, -1), (clean, 0, 1))
    return stats.log_ratio((part[:, loop], sign) for part, loop, sign in parts)
