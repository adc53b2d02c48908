"""The softmax of attention recomputed exactly where a query or a key is patched: AtP*'s remedy for saturation.

With scores s, pattern p = softmax(s) and g = df/dp, a node's estimate is the sum over its edges of g (p' - p):

    query q    p' = softmax of row q with the other run's query
    key t      s' differs at key t alone: p'_t = e^s'_t / (e^s'_t + sum over j != t of e^s_j), and the others keep
               their shares of 1 - p'_t

A gradient through a saturated softmax would be 0 where the exact change is not. Source: Kramar et al. 2024
(arXiv 2403.00745), section 3.1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.model.errors import UsageError
from loopmdm.model.precision import wide

FITS = 1e-3
"""How far scores may lie from scale x q . k + bias, relative to the largest."""


@dataclass(frozen=True)
class Scored:
    """One application: `q`, `k` [batch, pos, head, d_head] of the run and of the other one, scores and pattern."""

    q: Tensor
    k: Tensor
    other_q: Tensor
    other_k: Tensor
    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]

    def by_query(self, gradient: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch query head"]:
        """Effect of each query's patch, the pattern's gradient taken as it is."""
        moved = self.scores + self._scale() * _products(self.other_q - self.q, self.k)
        change = moved.softmax(-1).nan_to_num() - self.pattern  # a query without keys has none
        return (gradient * change).sum(-1).transpose(1, 2)

    def by_key(self, gradient: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch key head"]:
        """Effect of each key's patch alone, summed over queries."""
        moved = self.scores + self._scale() * _products(self.q, self.other_k - self.k)
        rest, others = self._others(gradient)
        after = (moved - rest).sigmoid()
        after = torch.where(self.scores == float("-inf"), 0.0, after.nan_to_num())
        whole = (gradient * self.pattern).sum(-1, keepdim=True)
        change = after * gradient + (1 - after) * others - whole
        return change.masked_fill(self.scores == float("-inf"), 0.0).sum(2).transpose(1, 2)

    def _others(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """By key: log-sum-exp of all other keys' scores, and the mean gradient over them.

        The best key's own are computed without it: 1 - p has no digits left where p is all but 1.
        """
        lse = self.scores.logsumexp(-1, keepdim=True)
        free = 1 - self.pattern
        rest = lse + torch.log1p(-self.pattern)
        others = ((gradient * self.pattern).sum(-1, keepdim=True) - gradient * self.pattern) / free
        best = self.scores.argmax(-1, keepdim=True)
        without = self.scores.scatter(-1, best, float("-inf"))
        rest = rest.scatter(-1, best, without.logsumexp(-1, keepdim=True))
        alone = (without.softmax(-1).nan_to_num() * gradient).sum(-1, keepdim=True)
        return rest, others.scatter(-1, best, alone)

    def _scale(self) -> float:
        """What scores are of q . k, read off them; UsageError where they are no such product."""
        known = self.scores > 0.5 * torch.finfo(self.scores.dtype).min  # masks may be large numbers, too
        x, y = (_centred(part, known) for part in (_products(self.q, self.k), self.scores))
        scale = float((x * y).sum() / (x * x).sum().clamp(min=1e-30))
        if float((y - scale * x).abs().max()) > FITS * max(float(y.abs().max()), 1e-6):
            raise UsageError("AtP* needs scores that are scale x q . k; this model's are more, ask for star=False")
        return scale


def _centred(x: Tensor, known: Tensor) -> Tensor:
    """Less the mean over what is known of each head, 0 elsewhere."""
    x = x.masked_fill(~known, 0.0)
    return (x - x.sum((-1, -2), keepdim=True) / known.sum((-1, -2), keepdim=True)).masked_fill(~known, 0.0)


def _products(q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
    return torch.einsum("bqhd,bkhd->bhqk", wide(q), wide(k))
