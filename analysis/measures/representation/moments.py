"""Sums over the states of a token group, from which similarities between loops follow exactly.

A sample is one position's state at every loop, or a sequence's mean of them (`unit`). With x_i its state at
loop a, y_i at loop b, both less a constant shift, the sums kept are

    n,  sum x,  X'Y,  sum |x|^2,  sum x |y|^2,  sum |x|^2 |y|^2

in float64, for every pair of loops. They add up over batches, so that one batch of states (of all loops) and
the sums, 8 L^2 d^2 / 2 bytes for L loops, are all that is ever held; no n x n matrix is made.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.analysis.watch.states import token_groups, trajectory
from loopmdm.model.errors import UsageError, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch

Unit = Literal["position", "sequence"]
Samples = Float[Tensor, "loop sample d_model"]


class LoopMoments:
    """The sums of one token group; without `pairs` of each loop with itself only.

    `cross[a]` [loop >= a, d_model, d_model] is X_a'X_b. The shift is the first batch's mean: the estimators do not
    depend on it, but rounding does.
    """

    def __init__(self, n_states: int, d_model: int, pairs: bool = True):
        self.n, self.pairs = 0, pairs
        self.shift = torch.zeros(n_states, 1, d_model, dtype=torch.float64)
        self.total = torch.zeros(n_states, d_model, dtype=torch.float64)
        self.cross = [
            torch.zeros(n_states - a if pairs else 1, d_model, d_model, dtype=torch.float64)
            for a in range(n_states)
        ]
        self.squares = torch.zeros(n_states, dtype=torch.float64)
        self.skew = torch.zeros(n_states, n_states, d_model, dtype=torch.float64)
        self.squares_cross = torch.zeros(n_states, n_states, dtype=torch.float64)

    def add(self, x: Samples) -> None:
        """Take in samples."""
        if x.shape[1] == 0:
            return
        if self.n == 0:
            self.shift = x.mean(1, keepdim=True)
        x = x - self.shift
        self.n += x.shape[1]
        self.total += x.sum(1)
        for a, cross in enumerate(self.cross):
            cross += x[a].T @ x[a : a + len(cross)]
        if self.pairs:
            norms = x.pow(2).sum(-1)
            self.squares += norms.sum(-1)
            self.skew += norms @ x  # [a, b] = sum x_a |x_b|^2
            self.squares_cross += norms @ norms.T

    def mean(self) -> Float[Tensor, "loop one d_model"]:
        """Mean state of each loop."""
        return self.shift + self.total[:, None] / self.n

    def covariance(self, a: int, b: int) -> Float[Tensor, "d_model d_model"]:
        """Of loop a's features with loop b's, b >= a."""
        return self.cross[a][b - a] / self.n - torch.outer(self.total[a], self.total[b]) / self.n**2


def check_unit(unit: str) -> None:
    """UsageError for an unknown unit."""
    check_word("unit", unit, get_args(Unit))


def check_chosen(loops: Sequence[int] | None, n_loops: int) -> list[int]:
    """The loops to look at, ascending; default all, with -1, the prelude's output."""
    chosen = list(range(-1, n_loops)) if loops is None else sorted(set(loops))
    if not chosen or any(isinstance(loop, bool) or not isinstance(loop, int) for loop in chosen):
        raise UsageError(f"loops must be integers from -1 (prelude output) to {n_loops - 1}, got {loops!r}")
    if chosen[0] < -1 or chosen[-1] >= n_loops:
        wrong = chosen[0] if chosen[0] < -1 else chosen[-1]
        raise UsageError(f"loop {wrong} is outside -1..{n_loops - 1}; raise n_loops or choose other loops")
    return chosen


def group_states(
    m: HookedLoopMDM, b: MaskedBatch, loops: list[int], unit: Unit, batch_size: int
) -> Iterator[tuple[str, Samples, Int[Tensor, " sample"]]]:
    """(token group, states float64, sequence of each sample), batch by batch, for the chosen loops."""
    for start, part in b.batches(batch_size):
        states = torch.stack([s for loop, s, _ in trajectory(m, part, max(loops[-1], 0) + 1) if loop in loops])
        for group, member in token_groups(m, part).items():
            x, owner = states[:, member].double(), member.nonzero()[:, 0]
            if unit == "sequence":
                present, index, counts = owner.unique(return_inverse=True, return_counts=True)
                sums = x.new_zeros(len(x), len(present), x.shape[-1]).index_add(1, index, x)
                x, owner = sums / counts[:, None], present
            yield group, x.cpu(), owner.cpu() + start
