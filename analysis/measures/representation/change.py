"""How the representation changes from loop to loop, and what each loop would answer.

State H(i) after loop i, H(-1) = prelude output, per position, averaged within a sequence and then
over sequences, masked and clean apart:

    step_norm        ||H(i) - H(i-1)||
    relative_change  ||H(i) - H(i-1)|| / ||H(i)||;  drift_null = 1 / (i + 1), what a constant drift gives
    state_cosine     cos(H(i), H(i-1));  step_cosine: cosine of successive steps (from loop 1)
    second_difference  ||H(i) - 2 H(i-1) + H(i-2)|| / ||H(i)|| (from loop 1), 0 for a constant drift
    kl_previous      KL(p_i || p_{i-1}), kl_last KL(p_last || p_i), both of read-outs (nats)
    top1_flips       share of positions whose best token differs from the previous loop's
    entropy, p_true, accuracy  of the read-out after loop i, at masked positions

Read-outs come by both lenses (`lenses.py`): through the coda, and, as direct_entropy and so on, from the
state itself. Pre-norm states grow, so a falling relative change alone is no convergence: read it beside
its null. The coda's read-out after loop i is the model at n_loops = i + 1. Definitions are ours.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.measures.representation.lenses import LENSES, answer, answer_metrics
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.groups import TOKEN_GROUPS
from loopmdm.analysis.watch.states import check_loops, group_mean, row_mean, token_groups, trajectory
from loopmdm.model.blocks import LogProbs
from loopmdm.model.errors import check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import By, check_by
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.stopping.rules import relative_change

COLUMNS = ["n_loops", "loop", "token_group", "mask_ratio", "metric", "lens", "value", "standard_error", "n"]
Rows = dict[tuple[int, str, str, str], Tensor]


def _state_metrics(loop: int, state: Tensor, previous: Tensor, before: Tensor | None) -> dict[str, Tensor]:
    """Metrics [batch, pos] of H(i), H(i-1) and, from loop 1 on, H(i-2)."""
    change = state - previous
    metrics = {
        "step_norm": change.norm(dim=-1),
        "relative_change": relative_change(state, previous),
        "drift_null": torch.full_like(change[..., 0], 1 / (loop + 1)),
        "state_norm": state.norm(dim=-1),
        "state_cosine": F.cosine_similarity(state, previous, dim=-1),
    }
    if before is not None:
        step = previous - before
        metrics["step_cosine"] = F.cosine_similarity(change, step, dim=-1)
        metrics["second_difference"] = (change - step).norm(dim=-1) / state.norm(dim=-1)
    return metrics


def _last_readouts(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, masked: Tensor) -> dict[str, LogProbs]:
    """One more trajectory for the last loop's read-outs, so that none pile up over the loops."""
    for loop, state, context in trajectory(m, b, n_loops):
        if loop == n_loops - 1:
            return {lens: answer(m, state, context, lens, masked) for lens in LENSES}
    raise AssertionError("a trajectory ends with its last loop")


def _batch_metrics(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, by: By) -> Rows:
    """Per-sequence means [batch] by (loop, token group, metric, lens); NaN where a group is empty."""
    groups, masked, rows = token_groups(m, b, by), token_groups(m, b)["masked"], {}
    clean, last = b.clean.masked_fill(b.unknown, -1)[masked], _last_readouts(m, b, n_loops, masked)
    before = previous = None
    reads: dict[str, LogProbs] = {}
    for loop, state, context in trajectory(m, b, n_loops):
        if previous is not None:
            for name, value in _state_metrics(loop, state, previous, before).items():
                for group in TOKEN_GROUPS:
                    rows[loop, group, name, ""] = group_mean(value, groups[group])
            for lens in LENSES:
                now = answer(m, state, context, lens, masked)
                prefix = "" if lens == "coda" else f"{lens}_"
                for name, value in answer_metrics(now, reads.get(lens), last[lens], clean).items():
                    rows[loop, "masked", prefix + name, lens] = row_mean(value, masked)
                reads[lens] = now
        before, previous = previous, state
    return rows


@torch.no_grad()
def representation_change(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
    by: By = "holds",
) -> pd.DataFrame:
    """Columns: n_loops loop token_group mask_ratio metric lens value standard_error n.

    `n_loops` may lie far beyond S_max: three states and four read-outs of one batch are held, whatever it is,
    and of large vocabularies only blocks of these (`blocks.py`).
    Read-out metrics exist for masked positions only; `lens` is "coda", "direct" (metric "direct_..") or "" for
    metrics of the state. Errors are over sequences, or over `clusters` [batch] of them. A group without members
    is NaN with n = 0. In a shifted model `by="predicts"` groups states by the token that they predict; read-outs
    are those of masked tokens either way. p_true and accuracy leave out sequences of which nobody knows what is
    hidden.

    >>> df = lm.representation_change(m, b, n_loops=4)
    >>> sorted(df["token_group"].unique())
    ['clean', 'masked']
    """
    check_model(m, "representation_change")
    check_by(m.facts, by, "representation_change")
    b, n_loops = as_batch("representation_change", b, clusters), check_loops(m, n_loops)
    parts = [part for _, _, part in b.each(batch_size, lambda part: _batch_metrics(m, part, n_loops, by))]
    rows = []
    for loop, group, metric, lens in parts[0]:
        values = torch.cat([part[loop, group, metric, lens] for part in parts]).double().cpu().numpy()
        mean, error, n = stats.mean_and_error(values, b.clusters)
        rows.append((n_loops, loop, group, b.mask_ratio, metric, lens, float(mean), float(error), int(n)))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame if by == "holds" else frame.assign(by=by)


MEASURES = (
    Measure(
        "representation-change",
        "change of the state, read-outs by both lenses",
        plain(representation_change),
        groupless=plain(representation_change),
        both_ways=True,
        shards=True,
    ),
)
