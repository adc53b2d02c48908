"""How many directions the states of a group use: effective rank.

    effective rank = exp(- sum p log p),  p = eigenvalues of the covariance / their sum

1 if all states lie on a line, d_model if they fill the space evenly (after Roy & Vetterli 2007, with eigenvalues
of the covariance instead of singular values). With n samples it is at most n - 1, and it is biased low unless n is
many times d_model: compare groups and loops at equal `n_samples`. A sample is a position, or a sequence's mean.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.measures.representation.moments import (
    LoopMoments,
    Unit,
    check_chosen,
    check_unit,
    group_states,
)
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.groups import TOKEN_GROUPS
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import entropy
from loopmdm.model.sequences import MaskedBatch, as_batch

COLUMNS = [
    "n_loops", "loop", "token_group", "mask_ratio", "unit", "metric", "value", "standard_error", "n", "n_samples",
]  # fmt: skip


def rank_of(covariance: Float[Tensor, "d_model d_model"]) -> tuple[float, Float[Tensor, "d_model d_model"]]:
    """Effective rank, and W with x'Wx its first-order change by a centred state x; NaN without variance."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    if not float(values.sum()) > 0:
        return float("nan"), torch.full_like(covariance, float("nan"))
    share = values / values.sum()
    known = share > 1e-12
    logs = torch.where(known, share.clamp(min=1e-300).log(), 0.0)
    spread = entropy(logs, share)
    slope = torch.where(known, logs + spread, 0.0)
    rank = spread.exp()
    return float(rank), -rank / values.sum() * (vectors * slope) @ vectors.T


@torch.no_grad()
def effective_rank(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    loops: Sequence[int] | None = None,
    unit: Unit = "position",
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Effective rank of the states after `loops` (default -1, the prelude's output, to n_loops - 1).

    Columns: n_loops loop token_group mask_ratio unit metric ("effective_rank") value standard_error n (sequences)
    n_samples. NaN where the states do not vary. Errors are first-order, over sequences or `clusters` of them.
    """
    b, n_loops = as_batch("effective_rank", b, clusters), check_loops(m, n_loops)
    check_unit(unit)
    chosen = check_chosen(loops, n_loops)
    sums = {group: LoopMoments(len(chosen), m.cfg.d_model, pairs=False) for group in TOKEN_GROUPS}
    for group, x, _ in group_states(m, b, chosen, unit, batch_size):
        sums[group].add(x)
    found = {
        group: [rank_of(s.covariance(a, a)) for a in range(len(chosen))] for group, s in sums.items() if s.n > 1
    }
    moved = {group: torch.zeros(len(b), len(chosen), dtype=torch.float64) for group in found}
    present = {group: torch.zeros(len(b), dtype=torch.bool) for group in TOKEN_GROUPS}
    for group, x, owner in group_states(m, b, chosen, unit, batch_size):
        present[group][owner] = True
        if group in found:
            x = x - sums[group].mean()
            change = torch.stack([((x[a] @ form) * x[a]).sum(-1) for a, (_, form) in enumerate(found[group])], -1)
            moved[group].index_add_(0, owner, change)
    rows = []
    for group, s in sums.items():
        members = present[group].numpy()
        for a, loop in enumerate(chosen):
            value, error = float("nan"), float("nan")
            if group in found:
                influence = moved[group][:, a].numpy() / s.n * members.sum()
                value = found[group][a][0]
                error = float(stats.influence_error(np.where(members, influence, np.nan), b.clusters))
            n = 0 if np.isnan(value) else int(members.sum())
            key = (n_loops, loop, group, b.mask_ratio, unit, "effective_rank")
            rows.append((*key, value, error, n, s.n))
    return pd.DataFrame(rows, columns=COLUMNS)


MEASURES = (
    Measure(
        "effective-rank",
        "effective rank of the states by loop",
        plain(effective_rank),
        groupless=plain(effective_rank),
    ),
)
