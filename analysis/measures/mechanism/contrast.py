"""What a read-out is asked: at each hidden position the true token against the best wrong one.

    difference = logit(true) - logit(wrong) = log p(true) - log p(wrong), nats

The wrong one is the best other token of the intact run at n_loops, and stays it whatever is changed afterwards. It
is best by its luck, too: any change sets it back on average. `any_wrong` has no such drift.
Of a causal model every token that has a next one is asked for that one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.watch.states import check_loops, row_mean
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import check_logits, wide
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch, as_batch, before_next


@dataclass(frozen=True, eq=False)
class Contrast:
    """`rows` [batch, pos] are asked; `right` and `wrong` [row] are ids, rows in reading order."""

    rows: Bool[Tensor, "batch pos"]
    right: Int[Tensor, " row"]
    wrong: Int[Tensor, " row"]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.right)

    def difference(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
        """logit(true) - logit(wrong), float32 or wider."""
        pair = wide(logits).gather(-1, torch.stack([self.right, self.wrong], -1))
        return pair[:, 0] - pair[:, 1]

    def by_sequence(self, values: Float[Tensor, " row"]) -> Float[Tensor, " batch"]:
        """Mean over each sequence's rows; NaN where it has none."""
        return row_mean(values, self.rows)

    def weights(self, dtype: torch.dtype) -> Float[Tensor, " row"]:
        """1 over the number of rows of a row's sequence: sums become means over rows, sequence by sequence."""
        return 1 / self.rows.sum(-1)[self.rows.nonzero()[:, 0]].to(dtype)

    def of(self, sequences: slice | np.ndarray) -> "Contrast":
        """The questions of some sequences, in rising order."""
        kept = torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.device)
        kept[sequences] = True
        chosen = kept[self.rows.nonzero()[:, 0]]
        return Contrast(self.rows[kept], self.right[chosen], self.wrong[chosen])


def questions(name: str, m: HookedLoopMDM, b: MaskedBatch) -> MaskedBatch:
    """The batch as the measure `name` asks it: hidden positions, of a causal model what comes next.

    UsageError where nothing is masked, or nobody knows what is.
    """
    b = as_batch(name, b)
    b = before_next(b) if m.facts.causal else b
    if not bool(b.masked.any()):
        raise UsageError(f"{name}: no position is masked, so nothing is asked; mask some")
    return b


def contrast(m: HookedLoopMDM, b: MaskedBatch, n_loops: int | None = None, name: str = "contrast") -> Contrast:
    """The true token and the best wrong one at n_loops (default S_max), of `questions`."""
    b = questions(name, m, b)
    with torch.no_grad():
        logits = m.run(b.tokens, check_loops(m, n_loops), attention_mask=b.attention_mask, rows=b.masked).logits
    check_logits(logits)
    return best_wrong(m, b, logits, name)


def best_wrong(m: HookedLoopMDM, b: MaskedBatch, logits: Float[Tensor, "row d_vocab"], name: str) -> Contrast:
    """As `contrast`, of a batch as `questions` gives it and of logits that are there."""
    right = _right(m, b, name)
    return Contrast(b.masked, right, logits.scatter(-1, right[:, None], float("-inf")).argmax(-1))


def any_wrong(m: HookedLoopMDM, b: MaskedBatch, seed: int = 0, name: str = "any_wrong") -> Contrast:
    """The true token against any other one, drawn evenly, in place of the best wrong one: a null without luck."""
    b = questions(name, m, b)
    right = _right(m, b, name)
    drawn = row_uniforms(seed, "tokens", len(right), m.cfg.d_vocab).to(right.device)
    drawn.scatter_(-1, right[:, None], -1.0)
    if m.cfg.mask_token_id is not None:
        drawn[:, m.cfg.mask_token_id] = -1.0
    return Contrast(b.masked, right, drawn.argmax(-1))


def _right(m: HookedLoopMDM, b: MaskedBatch, name: str) -> Int[Tensor, " row"]:
    return (b.clean if m.facts.causal else b.truth(name))[b.masked]
