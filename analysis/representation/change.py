"""How the representation changes from loop to loop, and what each loop would answer.

State H(i) after loop i, H(-1) = prelude output, per position, averaged within a sequence and then
over sequences, masked and clean apart:

    step_norm        ||H(i) - H(i-1)||
    relative_change  ||H(i) - H(i-1)|| / ||H(i)||;  drift_null = 1 / (i + 1), what a constant drift gives
    state_cosine     cos(H(i), H(i-1));  step_cosine: cosine of successive steps (from loop 1)
    kl_previous      KL(p_i || p_{i-1}), kl_last KL(p_last || p_i), both of the coda's read-outs (nats)
    top1_flips       share of positions whose best token differs from the previous loop's
    entropy, p_true, accuracy  of the read-out after loop i, at masked positions

Pre-norm states grow, so a falling relative change alone is no convergence: read it beside its null.
The read-out after loop i is the model at n_loops = i + 1. Definitions are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm_model import stats
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.hooked import HookedLoopMDM
from loopmdm_model.masking import MaskedBatch
from loopmdm_model.stopping import relative_change

TOKEN_GROUPS = ("masked", "clean")


@dataclass(frozen=True)
class LoopStep:
    """States around one loop and its read-out: H(i), H(i-1), H(i-2) or None; log-probabilities."""

    loop: int
    state: Tensor
    previous: Tensor
    before: Tensor | None
    log_probs: Tensor


def _steps(m: HookedLoopMDM, b: MaskedBatch, n_loops: int) -> Iterator[LoopStep]:
    """Walk one trajectory; H(-1) is caught by a hook at loop 0's input."""
    caught: list[Tensor] = []
    before = None
    with m.hooks([("loop.0.hook_in", lambda x, hook: caught.append(x.float()))]):  # noqa: ARG005
        for loop, (state, context) in enumerate(m.states(b.tokens, n_loops, b.attention_mask)):
            state = state.float()
            log_probs = m.readout(state.to(m.model.embed.weight.dtype), context).float().log_softmax(-1)
            yield LoopStep(loop, state, caught[-1], before, log_probs)
            before = caught[-1]
            caught.append(state)
            del caught[:-1]


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) over the last axis; [MASK]'s zero probability contributes nothing."""
    terms = left.exp() * (left - right)
    return terms.masked_fill(left == float("-inf"), 0.0).sum(-1)


def _state_metrics(step: LoopStep) -> dict[str, Tensor]:
    change = step.state - step.previous
    metrics = {
        "step_norm": change.norm(dim=-1),
        "relative_change": relative_change(step.state, step.previous),
        "drift_null": torch.full_like(change[..., 0], 1 / (step.loop + 1)),
        "state_norm": step.state.norm(dim=-1),
        "state_cosine": F.cosine_similarity(step.state, step.previous, dim=-1),
    }
    if step.before is not None:
        metrics["step_cosine"] = F.cosine_similarity(change, step.previous - step.before, dim=-1)
    return metrics


def readout_metrics(log_probs: Tensor, previous: Tensor | None, clean: Tensor) -> dict[str, Tensor]:
    """Metrics [batch, pos] of one read-out, against the one before if there is one."""
    top = log_probs.argmax(-1)
    metrics = {
        "entropy": -(log_probs.exp() * log_probs).masked_fill(log_probs == float("-inf"), 0.0).sum(-1),
        "p_true": log_probs.gather(-1, clean[..., None].long())[..., 0].exp(),
        "accuracy": (top == clean).float(),
    }
    if previous is not None:
        metrics["kl_previous"] = _kl(log_probs, previous)
        metrics["top1_flips"] = (top != previous.argmax(-1)).float()
    return metrics


def _batch_metrics(m: HookedLoopMDM, b: MaskedBatch, n_loops: int) -> dict[tuple[int, str, str], Tensor]:
    """Per-sequence means [batch] by (loop, token group, metric); NaN where a group is empty."""
    masked = b.tokens == m.cfg.mask_token_id
    real = torch.ones_like(masked) if b.attention_mask is None else b.attention_mask != 0
    groups = {"masked": masked & real, "clean": ~masked & real}
    rows: dict[tuple[int, str, str], Tensor] = {}

    def put(loop: int, group: str, metrics: dict[str, Tensor]) -> None:
        member = groups[group]
        for name, value in metrics.items():
            rows[loop, group, name] = (value * member).sum(-1) / member.sum(-1)

    # One more forward for the last read-out, so that no read-outs pile up over the loops.
    last = m(b.tokens, n_loops, attention_mask=b.attention_mask).float().log_softmax(-1)
    previous = None
    for step in _steps(m, b, n_loops):
        for group in TOKEN_GROUPS:
            put(step.loop, group, _state_metrics(step))
        put(step.loop, "masked", readout_metrics(step.log_probs, previous, b.clean))
        put(step.loop, "masked", {"kl_last": _kl(last, step.log_probs)})
        previous = step.log_probs
    return rows


@torch.no_grad()
def representation_change(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Columns: n_loops loop token_group mask_ratio metric value standard_error n.

    Read-out metrics exist for masked positions only. Errors are over sequences, or over `clusters`
    [batch] of them. A group without members is NaN with n = 0.
    """
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    if not isinstance(b, MaskedBatch):
        raise UsageError("representation_change takes a MaskedBatch; make one with m.mask(text, ratio=.5)")
    parts = [
        _batch_metrics(m, b.rows(slice(start, start + batch_size)), n_loops)
        for start in range(0, len(b), batch_size)
    ]
    rows = []
    for loop, group, metric in parts[0]:
        values = torch.cat([part[loop, group, metric] for part in parts]).double().cpu().numpy()
        mean, error, n = stats.mean_and_error(values, clusters)
        rows.append((n_loops, loop, group, b.mask_ratio, metric, float(mean), float(error), int(n)))
    columns = ["n_loops", "loop", "token_group", "mask_ratio", "metric", "value", "standard_error", "n"]
    return pd.DataFrame(rows, columns=columns)
