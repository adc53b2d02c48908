"""What a state would answer, by two lenses: the coda then the unembedding, or the unembedding directly.

The coda's read-out after loop i is the model at n_loops = i + 1. The direct one skips the coda's layers,
for which the state was made: where the two disagree, the direct one says what is linearly there, not what
the model would say (the two lenses paint different pictures of a recurrent model: arXiv 2507.02199).

    entropy, p_true, accuracy   of one read-out
    kl_previous                 KL(p_i || p_{i-1}), nats;  top1_flips: whether the best token changed
"""

from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.context import Context
from loopmdm.model.errors import check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.stopping.rules import Lens

LENSES: tuple[Lens, ...] = get_args(Lens)


def check_lens(lens: str) -> None:
    """UsageError for an unknown lens."""
    check_word("lens", lens, LENSES)


def read(
    m: HookedLoopMDM, state: Tensor, context: Context, lens: Lens, rows: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities at the positions `rows`, in reading order, float32 or wider; [MASK] has -inf."""
    state = state.to(m.model.dtype)
    if not bool(rows.any()):
        return torch.zeros(0, m.cfg.d_vocab, device=state.device)
    logits = m.readout(state, context, rows=rows) if lens == "coda" else m.model.unembedding(state, rows=rows)
    return wide(logits).log_softmax(-1)


def kl(left: Float[Tensor, "*row d_vocab"], right: Float[Tensor, "*row d_vocab"]) -> Float[Tensor, "*row"]:
    """KL(left || right) in nats over the last axis; [MASK]'s zero probability contributes nothing."""
    terms = left.exp() * (left - right)
    return terms.masked_fill(left == float("-inf"), 0.0).sum(-1)


def readout_metrics(
    log_probs: Float[Tensor, "*row d_vocab"],
    previous: Float[Tensor, "*row d_vocab"] | None,
    clean: Int[Tensor, "*row"],
) -> dict[str, Float[Tensor, "*row"]]:
    """Metrics of one read-out, against the one before if there is one."""
    top = log_probs.argmax(-1)
    metrics = {
        "entropy": -(log_probs.exp() * log_probs).masked_fill(log_probs == float("-inf"), 0.0).sum(-1),
        "p_true": log_probs.gather(-1, clean[..., None].long())[..., 0].exp(),
        "accuracy": (top == clean).float(),
    }
    if previous is not None:
        metrics["kl_previous"] = kl(log_probs, previous)
        metrics["top1_flips"] = (top != previous.argmax(-1)).float()
    return metrics
