"""Where the states go: paths over loops in the plane of their principal components.

The components are fitted on the states H(-1)..H(S-1) of all positions of one half of the sequences (of the
clusters, where sequences share one); the other half is projected, each sequence's positions averaged, so that a
path is not drawn in the plane chosen to show it. Smooth arcs alone say little: a random walk gives them too
(Antognini & Sohl-Dickstein 2018). Definitions are ours.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.watch.groups import TOKEN_GROUPS
from loopmdm.analysis.watch.states import check_loops, token_groups, trajectory
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch


class StateSums:
    """Count, sum and cross-products of states, float64, less the first batch's mean (for rounding)."""

    def __init__(self, d_model: int):
        self.n = 0
        self.shift = self.total = torch.zeros(d_model, dtype=torch.float64)
        self.cross = torch.zeros(d_model, d_model, dtype=torch.float64)

    def add(self, x: Float[Tensor, "sample d_model"]) -> None:
        """Take in states."""
        if self.n == 0 and len(x):
            self.shift = x.mean(0)
        x = x - self.shift
        self.n += len(x)
        self.total = self.total + x.sum(0)
        self.cross += x.T @ x

    def components(self, k: int) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model k"]]:
        """Mean and the first k principal axes, each with its largest loading positive; NaN without states."""
        if self.n == 0:
            nan = self.total * float("nan")
            return nan, nan[:, None].repeat(1, k)
        mean = self.total / self.n
        _, vectors = torch.linalg.eigh(self.cross / self.n - torch.outer(mean, mean))
        axes = vectors.flip(-1)[:, :k]
        signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        return self.shift + mean, axes * signs


def fitted_half(owners: np.ndarray) -> Bool[Tensor, " batch"]:
    """Every other sequence, or all sequences of every other cluster in order of appearance."""
    order = {name: place for place, name in enumerate(dict.fromkeys(owners.tolist()))}
    if len(order) < 2:
        raise UsageError("paths are fitted on one half and drawn from the other: give two sequences or clusters")
    return torch.tensor([order[name] % 2 == 0 for name in owners.tolist()])


class Projection:
    """Mean projections [sequence, loop, k] of one group on its plane; squared distances along it and in all."""

    def __init__(self, sums: StateSums, n: int, n_loops: int, k: int):
        self.origin, self.axes = sums.components(k)
        self.paths = torch.full((n, n_loops + 1, k), float("nan"), dtype=torch.float64)
        self.along, self.all = torch.zeros(k, dtype=torch.float64), 0.0

    def add(self, start: int, loop: int, state: Tensor, member: Bool[Tensor, "batch pos"]) -> None:
        """Take in one batch's states after one loop."""
        x, weight = state.double().cpu() - self.origin, member.cpu()[..., None]
        points = x @ self.axes
        self.paths[start : start + len(x), loop + 1] = (points * weight).sum(1) / weight.sum(1)
        self.along += (points.pow(2) * weight).sum((0, 1))
        self.all += float((x.pow(2) * weight).sum())

    def frame(self, group: str, sequence: np.ndarray) -> pd.DataFrame:
        """One row a sequence and loop."""
        n, width, k = self.paths.shape
        row, place = np.divmod(np.arange(n * width), width)
        frame = pd.DataFrame({"token_group": group, "sequence": sequence[row], "loop": place - 1})
        for index in range(k):
            frame[f"pc{index + 1}"] = self.paths[..., index].flatten().numpy()
        shares = self.along / self.all if self.all > 0 else self.along * float("nan")
        return frame.assign(**{f"explained{index + 1}": float(share) for index, share in enumerate(shares)})


@torch.no_grad()
def state_paths(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    n_components: int = 2,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Paths of the sequences the components were not fitted on, a plane a token group.

    Columns: n_loops token_group mask_ratio sequence loop (from -1) pc1 pc2 .. (a sequence's mean over the group's
    positions, units of the state) explained1 explained2 .. (share of the held-out states' squared distance from
    the fitted mean that lies along each component, over positions, loops and sequences). One batch and one loop's
    states are held. NaN without members in either half.
    """
    b, n_loops = as_batch("state_paths", b, clusters), check_loops(m, n_loops)
    if check_count("n_components", n_components) > m.cfg.d_model:
        raise UsageError(f"n_components {n_components} exceeds d_model = {m.cfg.d_model}")
    fit = fitted_half(b.owners)
    sums = {group: StateSums(m.cfg.d_model) for group in TOKEN_GROUPS}
    for _, _, state, groups in _visit(m, b.rows(fit), n_loops, batch_size):
        for group in TOKEN_GROUPS:
            sums[group].add(state[groups[group]].double().cpu())
    held, others = b.rows(~fit), torch.nonzero(~fit)[:, 0].numpy()
    drawn = {group: Projection(sums[group], len(held), n_loops, n_components) for group in TOKEN_GROUPS}
    for start, loop, state, groups in _visit(m, held, n_loops, batch_size):
        for group in TOKEN_GROUPS:
            drawn[group].add(start, loop, state, groups[group])
    frame = pd.concat([drawn[group].frame(group, others) for group in TOKEN_GROUPS], ignore_index=True)
    frame.insert(0, "n_loops", n_loops)
    frame.insert(2, "mask_ratio", b.mask_ratio)
    return frame


def _visit(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int, batch_size: int
) -> Iterator[tuple[int, int, Tensor, dict[str, Tensor]]]:
    """(index of the first sequence, loop, states, token groups), batch by batch and loop by loop."""
    for start, part in b.batches(batch_size):
        groups = token_groups(m, part)
        for loop, state, _ in trajectory(m, part, n_loops):
            yield start, loop, state, groups


PATHS = plain(state_paths)
MEASURES = (Measure("state-paths", "paths of the mean state in PCA coordinates", PATHS, loops=2, groupless=PATHS),)
