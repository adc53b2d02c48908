"""Entropy and divergence in nats: the one definition of each, on log-probabilities over the last axis.

    H(p) = - sum p log p,    KL(p || q) = sum p (log p - log q)

A token without probability, such as [MASK] with its log-probability of -inf, counts nothing: 0 log 0 = 0.
Where p is at hand as such, it is given, too: exp(log p) need not be p to the last bit.
"""

from jaxtyping import Float
from torch import Tensor

LEAST = -1e9
"""Far below the logarithm of any number above 0: a probability of 0 times this is 0."""


def entropy(log_p: Float[Tensor, "*#row n"], p: Float[Tensor, "*#row n"] | None = None) -> Float[Tensor, "*#row"]:
    """Entropy of `log_p`, between 0 and log n."""
    p = log_p.exp() if p is None else p
    return log_p.clamp(min=LEAST).mul_(p).sum(-1).neg()


def kl(
    log_p: Float[Tensor, "*#row n"], log_q: Float[Tensor, "*#row n"], p: Float[Tensor, "*#row n"] | None = None
) -> Float[Tensor, "*#row"]:
    """KL(p || q); inf where q rules out what p allows. Of nearly equal p and q rounding may take it below 0."""
    p = log_p.exp() if p is None else p
    return (p * (log_p - log_q)).masked_fill_(p == 0, 0.0).sum(-1)
