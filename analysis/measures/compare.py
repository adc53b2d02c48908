"""Two answers to the same masked sequences, position by position: what an intervention, a loop or a model changed.

At every masked position, of the answers p (first) and q (second):

    change   log q(true) - log p(true)
    kl       KL(p || q)
    flipped  the best token is another one

[MASK] has no probability in either, so that nothing is NaN where logits of -inf would be subtracted.
"""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import kl
from loopmdm.model.precision import check_logits, wide
from loopmdm.model.protocol import LoopOutput
from loopmdm.model.sequences import MaskedBatch

Answered = HookedLoopMDM | LoopOutput | Tensor
"""A model, what it gave, or logits [batch, pos, d_vocab]."""


@torch.no_grad()
def compare(a: Answered, b: Answered, batch: MaskedBatch, n_loops: int | None = None) -> pd.DataFrame:
    """How answers `b` differ from answers `a` at the masked positions of `batch`; a row a position.

    `n_loops` is for models (default: each one's own). Logits may lack the column of [MASK], if both do. Columns:
    sequence pos true best_a best_b p_true_a p_true_b change kl flipped; tokens are ids; `true`, `p_true_*` and
    `change` are missing where nobody knows what is hidden. Nats. UsageError where shapes differ or logits are of
    other sequences or another vocabulary, NotFiniteError where they say nothing.

    Of a causal model (give the model: logits do not tell) the batch is `before_next`'s, and a token that repeats
    the one before is known, too.

    >>> with lm.cut(m, "masked->masked"):
    ...     changed = m(b, n_loops=4)
    >>> int(lm.compare(m(b, n_loops=4), changed, b).isna().sum().sum())
    0
    """
    if not isinstance(batch, MaskedBatch):
        raise UsageError("compare(a, b, batch) needs the masked batch that was answered; m.mask makes one")
    log_p, log_q = (_log_probs(answers, name, batch, n_loops) for answers, name in ((a, "a"), (b, "b")))
    if log_p.shape != log_q.shape:
        raise UsageError(f"a has {log_p.shape[-1]} tokens, b {log_q.shape[-1]}; compare models of one vocabulary")
    sequence, pos = batch.masked.nonzero(as_tuple=True)
    causal = any(isinstance(one, HookedLoopMDM) and one.facts.causal for one in (a, b))
    known = ~batch.unknown[batch.masked] | causal  # it sees the token before, which the next one may repeat
    true = batch.clean[batch.masked].long().where(known, 0)
    if len(true) and int(true.max()) >= log_p.shape[-1]:
        raise UsageError(
            f"the batch hides ids from {log_p.shape[-1]} on, which the answers lack; "
            "compare answers of the batch's own vocabulary"
        )
    said = {"a": log_p.gather(-1, true[:, None])[:, 0], "b": log_q.gather(-1, true[:, None])[:, 0]}
    best = {name: log.argmax(-1) for name, log in (("a", log_p), ("b", log_q))}
    columns = {"sequence": sequence, "pos": pos, "true": true, "best_a": best["a"], "best_b": best["b"]}
    columns |= {f"p_true_{name}": log.exp() for name, log in said.items()}
    columns |= {"change": said["b"] - said["a"], "kl": kl(log_p, log_q).clamp(min=0)}
    frame = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    frame["flipped"] = frame["best_a"] != frame["best_b"]
    unknown = ~known.cpu().numpy()
    frame["true"] = frame["true"].astype("Int64").mask(unknown)
    frame.loc[unknown, ["p_true_a", "p_true_b", "change"]] = float("nan")
    return frame


def _log_probs(
    answers: Answered, name: str, batch: MaskedBatch, n_loops: int | None
) -> Float[Tensor, "row token"]:
    """Log-probabilities at the masked positions, in float32 at least; NotFiniteError if logits say nothing."""
    if isinstance(answers, HookedLoopMDM):
        answers = answers(batch, n_loops=n_loops)
    logits = answers.logits if isinstance(answers, LoopOutput) else answers
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(answers).__name__
        raise UsageError(f"{name} is {found}; give a model, or logits [batch, pos, d_vocab]")
    if logits.shape[:2] != batch.tokens.shape:
        raise UsageError(
            f"{name} answers {list(logits.shape[:2])} positions, the batch has {list(batch.tokens.shape)}"
        )
    chosen = logits[batch.masked]
    check_logits(chosen)
    return wide(chosen).log_softmax(-1)
