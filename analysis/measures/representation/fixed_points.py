"""Does the loop come to rest? Residuals far out, and how the loop acts on small changes of the state.

One loop at a fixed context (tokens, padding) is a map F of a sequence's state H [pos, d_model]:

    residual          ||F(H) - H|| / ||H||, over all real positions of a sequence
    spectral radius   max |eigenvalue| of dF/dH, by Arnoldi iteration on Jacobian-vector products
    growth rate       (1/k) log(||J_k .. J_1 v|| / ||v||), v random, along the next k loops (nats a loop)

The radius belongs to a fixed point: it is given only where the residual verifies one, elsewhere the finite-time
growth rate is. A small residual is not enough, as a constant drift of a growing state has one too: the step itself
must have halved since half as many loops (a step that falls as 1/i has not), or be lost in float32's rounding
while far below the largest one and below 1/i of it. Padding is no part of H. Definitions are ours.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import check_loops, token_groups, trajectory
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_count, check_seed
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch

FLOOR = 1e-6
"""Relative steps below this (8 units of float32's last place) are rounding."""
SUMMARY_KEYS = ["n_loops", "mask_ratio"]


@dataclass(frozen=True)
class LoopMap:
    """F: one loop of `m` at a fixed context, hooks included, as iteration number `loop`.

    Attention runs on the explicit path: the fused one has no forward derivative on processors.
    """

    m: HookedLoopMDM
    context: Context
    loop: int

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """F(x)."""
        return self.m.loop(x, self.context, self.loop, attn_path="eager")

    def push(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and dF/dH v: forward mode, or reverse mode twice where an operation has no forward derivative."""
        try:
            return torch.func.jvp(self, (x,), (v,))
        except (RuntimeError, NotImplementedError) as error:
            if "forward" not in str(error).lower():
                raise
        with torch.enable_grad():
            value, change = torch.autograd.functional.jvp(self, x, v)
        assert isinstance(value, Tensor) and isinstance(change, Tensor)
        return value.detach(), change.detach()


def tangents(shape: torch.Size, first: int, seed: int) -> Float[Tensor, "batch pos d_model"]:
    """Random directions; row r belongs to sequence first + r, whatever its batch."""
    rows = [np.random.default_rng([seed, first + row]).standard_normal(shape[1:]) for row in range(shape[0])]
    return torch.from_numpy(np.stack(rows)).float()


def spectral_radius(
    loop_map: LoopMap, x: Float[Tensor, "1 pos d_model"], start: Float[Tensor, "1 pos d_model"]
) -> float:
    """Spectral radius of dF/dH at x, over the context's real positions; NaN if Arnoldi does not converge.

    `start` is where the iteration starts.
    """
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigs  # late: half a second

    real = loop_map.context.real[0]
    size = int(real.sum()) * x.shape[-1]

    def apply(vector: np.ndarray) -> np.ndarray:
        v = torch.zeros_like(x)
        v[0, real] = torch.from_numpy(np.ascontiguousarray(vector)).to(x).view(-1, x.shape[-1])
        return loop_map.push(x, v)[1][0, real].detach().double().flatten().cpu().numpy()

    operator = LinearOperator((size, size), matvec=apply, dtype=np.float64)
    first = start[0, real.to(start.device)].double().flatten().numpy()
    try:
        found = eigs(operator, k=1, v0=first, ncv=min(24, size), tol=1e-4, maxiter=60, return_eigenvectors=False)
    except (ArpackNoConvergence, ArpackError):
        return float("nan")
    return float(np.abs(found).max())


def growth_rate(loop_map: LoopMap, x: Tensor, v: Tensor, horizon: int) -> Float[Tensor, " batch"]:
    """Growth of v along the next `horizon` loops from x, nats a loop, one a sequence; -inf if it dies out."""
    v = v.to(x) * loop_map.context.real[..., None]
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for step in range(horizon):
        v = v / v.flatten(1).norm(dim=-1).clamp(min=1e-30)[:, None, None]  # so that nothing overflows
        x, v = LoopMap(loop_map.m, loop_map.context, loop_map.loop + step).push(x, v)
        v = v * loop_map.context.real[..., None]
        total += v.flatten(1).norm(dim=-1).double().log()
    return total / horizon


@dataclass(frozen=True)
class Steps:
    """||F(H(i)) - H(i)|| and ||H(i)|| [group, loop, batch], i = 0..S-1, groups all, masked, clean; H(S-1)."""

    sizes: Tensor
    norms: Tensor
    state: Tensor
    context: Context

    @property
    def residual(self) -> Tensor:
        """NaN for empty groups."""
        return self.sizes / self.norms

    def verified(self, tol: float) -> Bool[Tensor, " batch"]:
        """Which sequences have H(S-1) at a fixed point (see the module's docstring)."""
        sizes, residual = self.sizes[0], self.residual[0, -1]
        last, n = sizes[-1], len(sizes)
        falling = last <= sizes[(n - 1) // 2] / 2
        rounding = (residual < FLOOR) & (last <= sizes.amax(0) * min(tol, 0.1 / n))
        return (residual < tol) & (falling | rounding)


def follow(m: HookedLoopMDM, b: MaskedBatch, n_loops: int) -> Steps:
    """Run one loop beyond `n_loops` on the explicit path."""
    members = torch.stack([b.real, *token_groups(m, b).values()]).float()
    sizes, norms, previous = [], [], None
    for loop, state, context in trajectory(m, b, n_loops + 1, "eager"):
        if loop > 0:
            assert previous is not None
            sizes.append(_norms(state - previous, members))
            norms.append(_norms(previous, members))
        if loop == n_loops:
            assert previous is not None
            return Steps(torch.stack(sizes, 1), torch.stack(norms, 1), previous, context)
        previous = state
    raise AssertionError("a trajectory ends with its last loop")


def _norms(x: Tensor, members: Tensor) -> Float[Tensor, "group batch"]:
    """Norms over each group's positions, float64; NaN for empty groups."""
    squares = (members * x.pow(2).sum(-1)).double().sum(-1)
    return squares.masked_fill(members.sum(-1) == 0, float("nan")).sqrt()


@torch.no_grad()
def fixed_point_residual(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int = 64,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Residual of H(i) after every loop i; groups "all", and the masked or the clean positions' part of it.

    Columns: n_loops loop token_group mask_ratio metric ("residual") value standard_error n. Errors are over
    sequences, or `clusters` of them. Memory does not grow with `n_loops` (two states of a batch).
    """
    b, n_loops = as_batch("fixed_point_residual", b, clusters), check_loops(m, n_loops)
    parts = [follow(m, part, n_loops).residual for _, part in b.batches(batch_size)]
    values = torch.cat(parts, -1).permute(2, 0, 1).cpu().numpy()
    found = [array.astype(object) for array in stats.mean_and_error(values, b.clusters)]
    rows = [
        (n_loops, loop, name, b.mask_ratio, "residual", *(array[group, loop] for array in found))
        for group, name in enumerate(("all", "masked", "clean"))
        for loop in range(n_loops)
    ]
    columns = ["n_loops", "loop", "token_group", "mask_ratio", "metric", "value", "standard_error", "n"]
    return pd.DataFrame(rows, columns=columns)


def _action(m: HookedLoopMDM, steps: Steps, verified: Tensor, v: Tensor, horizon: int) -> list[tuple]:
    """(kind, value, rate) of each sequence, from its last state and a direction."""
    loop = steps.sizes.shape[1]
    state = steps.state.to(m.model.dtype)
    growth, moving = torch.full((len(state),), float("nan"), dtype=torch.float64), ~verified
    if bool(moving.any()):
        there = LoopMap(m, steps.context.rows(moving), loop)
        growth[moving.cpu()] = growth_rate(there, state[moving], v[moving.cpu()], horizon).cpu()
    rows = []
    for row, rate in enumerate(growth.tolist()):
        if not verified[row]:
            rows.append(("growth_rate", rate, rate))
            continue
        one = torch.tensor([row], device=state.device)
        radius = spectral_radius(LoopMap(m, steps.context.rows(one), loop), state[one], v[row : row + 1])
        kind = "no_convergence" if math.isnan(radius) else "spectral_radius"
        rows.append((kind, radius, -math.inf if radius == 0 else math.log(radius)))
    return rows


@torch.no_grad()
def fixed_points(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int = 64,
    tol: float = 1e-4,
    horizon: int = 8,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """How the loop acts around H(n_loops - 1), one row a sequence.

    Columns: n_loops mask_ratio sequence residual verified kind value rate. `kind` is "spectral_radius" where a
    fixed point is verified, "growth_rate" (over the next `horizon` loops) elsewhere, "no_convergence" (NaN) where
    Arnoldi fails. `rate` is in nats a loop for both kinds: log of the radius, or the growth rate. Below 0, changes
    die out.
    """
    b, n_loops = as_batch("fixed_points", b), check_loops(m, n_loops)
    check_count("horizon", horizon)
    check_seed(seed)
    if not isinstance(tol, int | float) or not 0 < tol < 1:
        raise UsageError(f"tol must be a relative residual between 0 and 1, such as 1e-4, got {tol!r}")
    rows = []
    for first, part in b.batches(batch_size):
        steps = follow(m, part, n_loops)
        verified, v = steps.verified(tol), tangents(steps.state.shape, first, seed)
        action = _action(m, steps, verified, v, horizon)
        for row, residual in enumerate(steps.residual[0, -1].tolist()):
            rows.append((n_loops, b.mask_ratio, first + row, residual, bool(verified[row]), *action[row]))
    columns = [*SUMMARY_KEYS, "sequence", "residual", "verified", "kind", "value", "rate"]
    return pd.DataFrame(rows, columns=columns)


def fixed_point_summary(frame: pd.DataFrame, clusters: np.ndarray | None = None) -> pd.DataFrame:
    """Means of `fixed_points` over sequences: n_loops mask_ratio metric value standard_error n.

    Metrics: residual, verified (a share), spectral_radius and growth_rate, each over its own sequences.
    """
    rows = []
    for key, part in frame.groupby(SUMMARY_KEYS, sort=True):
        values = {"residual": part["residual"], "verified": part["verified"].astype(float)}
        for kind in ("spectral_radius", "growth_rate"):
            values[kind] = part["value"].where(part["kind"] == kind)
        owner = None if clusters is None else np.asarray(clusters)[part["sequence"].to_numpy()]
        for metric, column in values.items():
            mean, error, n = stats.mean_and_error(column.to_numpy(dtype=float), owner)
            rows.append((*key, metric, float(mean), float(error), int(n)))
    return pd.DataFrame(rows, columns=[*SUMMARY_KEYS, "metric", "value", "standard_error", "n"])


def of_few(case: Case, b: MaskedBatch, n_sequences: int = 16, least_loops: int = 64) -> pd.DataFrame:
    """Of `n_sequences`: Arnoldi on Jacobian-vector products takes a second or so a sequence."""
    few = b.rows(torch.linspace(0, len(b) - 1, min(n_sequences, len(b))).long())
    found = fixed_points(case.m, few, max(least_loops, case.n_loops), seed=case.seed)
    return fixed_point_summary(found, few.clusters).assign(n_units=few.n_units)


MEASURES = (Measure("fixed-points", "residual far out; spectral radius or growth rate", of_few, groupless=of_few),)
