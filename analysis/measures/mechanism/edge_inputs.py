"""What an edge is made to carry instead: a second input, with the same positions masked.

    token       one visible token changed to another one: a clue, or a clean token; what depends on it must hear
    resample    the whole of another sequence, under the same mask: all that an edge can say is exchanged

Both keep masks, length and groups of positions, so that edges of both runs mean the same (Zhang & Nanda 2024 on
how to corrupt; Chan et al. 2022 on resampling).
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.analysis.measures.interventions.values import donors
from loopmdm.model.errors import UsageError, check_seed, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch

Corruption = Literal["token", "resample"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)


def corrupted(
    m: HookedLoopMDM, b: MaskedBatch, how: Corruption = "token", seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """The tokens of `b` (as `questions` gives it) corrupted; what is masked stays so.

    "token" takes a visible position at random and puts a token of another sequence there, "resample" all visible
    tokens of another one, of another document where several share one. UsageError where a sequence shows nothing
    ("token"), where sequences cannot swap masks ("resample"), and for fewer than two sequences.
    """
    check_word("corruption", how, CORRUPTIONS)
    check_seed(seed)
    if how == "token":
        return _one_changed(m, b, seed)
    if b.sequences.real is not None:
        raise UsageError('corruption "resample" needs sequences without padding; take "token"')
    others = torch.from_numpy(donors(b.sequences, seed, 0))
    hidden = m.cfg.hidden(b.tokens)
    shown = b.sequences.tokens if not m.facts.causal else b.tokens
    return torch.where(hidden, b.tokens, shown[others])


def _one_changed(m: HookedLoopMDM, b: MaskedBatch, seed: int) -> Int[Tensor, "batch pos"]:
    """In each sequence one visible position, at random, holds what others hold at random positions."""
    visible = b.real & ~m.cfg.hidden(b.tokens)
    if m.facts.causal:
        visible = visible & b.masked  # the last token is heard by none
    if not bool(visible.any(-1).all()):
        number = int((~visible.any(-1)).nonzero()[0, 0])
        raise UsageError(f"sequence {number} shows no token that could be changed; mask less, or leave it out")
    batch, width = b.tokens.shape
    drawn = row_uniforms(seed, "tokens", batch, width).to(b.tokens.device)
    place = drawn.masked_fill(~visible, -1).argmax(-1)
    pool = b.tokens[visible]
    offered = pool[(row_uniforms(seed, "tokens", batch, N_OFFERS, step=1).to(pool.device) * len(pool)).long()]
    own = b.tokens.gather(-1, place[:, None])
    other = _first(offered, offered != own)
    return b.tokens.scatter(-1, place[:, None], other[:, None])


N_OFFERS = 64
"""Tokens drawn for one place; the first that differs is taken."""


def _first(offered: Int[Tensor, "batch offer"], differs: Bool[Tensor, "batch offer"]) -> Int[Tensor, " batch"]:
    if not bool(differs.any(-1).all()):
        raise UsageError("all visible tokens are the same, so none can be changed; give other sequences")
    return offered.gather(-1, differs.int().argmax(-1)[:, None])[:, 0]


def changed(clean: Int[Tensor, "batch pos"], corrupt: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Where the two inputs differ."""
    if clean.shape != corrupt.shape:
        raise UsageError(
            f"the corrupted tokens have shape {list(corrupt.shape)}, the clean ones {list(clean.shape)}"
        )
    return clean != corrupt
