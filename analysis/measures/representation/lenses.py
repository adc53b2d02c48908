"""What a state would answer, by two lenses: the coda then the unembedding, or the unembedding directly.

Two more are learned from a model, one map a loop, and stand in `learned_lenses.py`.

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

from loopmdm.model.blocks import LogProbs, RowLogits
from loopmdm.model.context import Context
from loopmdm.model.errors import check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import entropy, kl
from loopmdm.model.stopping.rules import Lens

LENSES: tuple[Lens, ...] = get_args(Lens)
LEARNED = ("tuned", "jacobian")
"""Lenses that are fitted to a model before they read it: `learned_lenses.py`."""


def check_lens(lens: str) -> None:
    """UsageError for an unknown lens."""
    check_word("lens", lens, LENSES)


def read(
    m: HookedLoopMDM, state: Tensor, context: Context, lens: Lens, rows: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities at the positions `rows`, in reading order, float32 or wider; [MASK] has -inf.

    NotFiniteError if the logits say nothing.
    """
    return answer(m, state, context, lens, rows).all()


def answer(
    m: HookedLoopMDM, state: Tensor, context: Context, lens: Lens, rows: Bool[Tensor, "batch pos"]
) -> LogProbs:
    """As `read`, block by block of the rows."""
    state, d_vocab = state.to(m.model.dtype), m.cfg.d_vocab
    if not bool(rows.any()):
        logits = RowLogits(rows, d_vocab, torch.zeros(0, d_vocab, device=state.device))
    elif lens == "coda":
        logits = m.read(state, context, rows=rows)
    else:
        logits = RowLogits.of(lambda some: m.model.unembedding(state, rows=some), rows, d_vocab)
    return LogProbs.of(logits)


def answer_metrics(
    now: LogProbs, previous: LogProbs | None, last: LogProbs, clean: Int[Tensor, " row"]
) -> dict[str, Float[Tensor, " row"]]:
    """`readout_metrics`, and kl_last, KL(p_last || p_i), nats."""
    parts = []
    for span in now.spans:
        block = now[span]
        found = readout_metrics(block, None if previous is None else previous[span], clean[span])
        parts.append(found | {"kl_last": kl(last[span], block)})
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def readout_metrics(
    log_probs: Float[Tensor, "*row d_vocab"],
    previous: Float[Tensor, "*row d_vocab"] | None,
    clean: Int[Tensor, "*row"],
) -> dict[str, Float[Tensor, "*row"]]:
    """Metrics of one read-out, against the one before if there is one.

    Where `clean` is below 0 nobody knows the true token: p_true and accuracy are NaN.
    """
    top, unknown = log_probs.argmax(-1), clean < 0
    metrics = {
        "entropy": entropy(log_probs),
        "p_true": log_probs.gather(-1, clean[..., None].long().clamp(min=0))[..., 0].exp(),
        "accuracy": (top == clean).float(),
    }
    metrics |= {name: metrics[name].masked_fill(unknown, float("nan")) for name in ("p_true", "accuracy")}
    if previous is not None:
        metrics["kl_previous"] = kl(log_probs, previous)
        metrics["top1_flips"] = (top != previous.argmax(-1)).float()
    return metrics
