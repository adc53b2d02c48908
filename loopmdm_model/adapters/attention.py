"""Hearing attention wherever it is computed: `scaled_dot_product_attention` taken over while one block runs.

One place for all families whose attention is torch's fused function, whatever class calls it. Flash-attention's
and flex attention's own functions, and compiled blocks, are not reached.

    pattern = softmax(scale q k^T + mask),   z = pattern v
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loopmdm.model.precision import wide
from loopmdm.model.sites import EXPLICIT_ONLY
from loopmdm.model.tiles import Asked, Attend

LEAVES = ("attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", *EXPLICIT_ONLY, "attn.hook_z")
"""What is offered, in layout [batch, pos, head, d_head] or [batch, head, query, key]."""

Offer = Callable[[str, Tensor], Tensor]
How = Callable[[Asked, Offer], Tensor]


class AttentionEar(TorchFunctionMode):
    """Takes over where a block asks for fused attention, and offers the pieces.

    `explicit`: compute scores and pattern, and offer them too; else `instead` computes z where it is given;
    `listening` says whether calls made now belong to that block; `heard` counts them.
    """

    def __init__(
        self,
        offer: Offer,
        n_heads: int,
        explicit: bool,
        listening: Callable[[], bool],
        instead: Attend | None = None,
    ):
        super().__init__()
        self.offer, self.n_heads, self.explicit, self.listening = offer, n_heads, explicit, listening
        self.instead = instead
        self.heard = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Take over the one function; leave the rest."""
        if func is not F.scaled_dot_product_attention or not self.listening():
            return func(*args, **(kwargs or {}))
        self.heard += 1
        z = _explicit if self.explicit else _fused if self.instead is None else partial(_instead, self.instead)
        return attend(Asked(*args, **(kwargs or {})), self.n_heads, self.offer, z)


def attend(asked: Asked, n_heads: int, offer: Offer, how: How) -> Float[Tensor, "batch head query d_head"]:
    """Softmax attention as asked, offered piece by piece; `how` makes z.

    The result is a transposed view of [batch, query, head, d_head], the fused kernel's layout, which callers
    `.view`.
    """
    shape = asked.query.shape
    folded = asked.key.shape[2] == 1 and shape[1] * shape[2] == n_heads  # one query, grouped heads as its rows
    q = asked.query.reshape(shape[0], n_heads, 1, shape[-1]) if folded else asked.query
    v = _by_head(offer, "attn.hook_v", _repeated(asked.value, q.shape[1]))
    q = _by_head(offer, "attn.hook_rot_q", q)
    k = _by_head(offer, "attn.hook_rot_k", _repeated(asked.key, q.shape[1]))
    z = how(replace(asked, query=q, key=k, value=v), offer).transpose(1, 2).contiguous()
    z = offer("attn.hook_z", z).transpose(1, 2)
    return z.reshape(*shape[:-1], -1) if folded else z


def _explicit(asked: Asked, offer: Offer) -> Tensor:
    """Queries without any key get 0, as in the fused kernel; softmax alone would give NaN."""
    q, k, v = asked.query, asked.key, asked.value
    scores = offer("attn.hook_attn_scores", _masked(q @ k.transpose(-1, -2) * asked.factor, asked))
    blind = scores.amax(-1, keepdim=True) == float("-inf")
    pattern = wide(scores).softmax(-1)
    filled = pattern.masked_fill if pattern.requires_grad else pattern.masked_fill_  # gradients need it as it was
    return offer("attn.hook_pattern", filled(blind, 0.0).to(v.dtype)) @ v


def _fused(asked: Asked, offer: Offer) -> Tensor:  # noqa: ARG001
    options = {"attn_mask": asked.attn_mask, "is_causal": asked.is_causal, "scale": asked.scale}
    return F.scaled_dot_product_attention(asked.query, asked.key, asked.value, **options)


def _instead(other: Attend, asked: Asked, offer: Offer) -> Tensor:  # noqa: ARG001
    return other(asked)


def _by_head(offer: Offer, leaf: str, x: Tensor) -> Tensor:
    return offer(leaf, x.transpose(1, 2)).transpose(1, 2)


def _repeated(x: Tensor, n_heads: int) -> Tensor:
    """Keys or values [batch, kv head, pos, d_head] once for every query head that shares them."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def _masked(scores: Tensor, asked: Asked) -> Tensor:
    if asked.is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    mask = asked.attn_mask
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
