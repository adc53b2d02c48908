"""Pairs of runs that differ in what they show: what is changed, and where positions stand to it.

    token       one clean token. On a board a clue gets another symbol that no other clue of its row, column or box
                holds, so that the corrupted run has no conflict to see at once. Elsewhere a clean token, next to a
                masked one where there is such, is replaced by a clean token of another sequence
    resample    the whole of another sequence, of another document where several share one, under the same mask

What is hidden stays hidden, so that positions of both runs mean the same (Zhang & Nanda 2024 on how to corrupt;
Chan et al. 2022 on resampling).
"""

from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.analysis.measures.interventions.selections import RELATIONS, relation_of
from loopmdm.analysis.measures.interventions.values import donors
from loopmdm.model.errors import UsageError, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch, as_batch, before_next
from loopmdm.model.tasks.propagation import peers
from loopmdm.model.tasks.sudoku import Board, board_of_model

Corruption = Literal["token", "resample"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)


def corrupted(m: HookedLoopMDM, b: MaskedBatch, seed: int = 0, how: Corruption = "token") -> MaskedBatch:
    """`b` with one clean token of every sequence changed, or all of them; sequences without any stay as they are.

    Row i of what is drawn depends on `seed` and i. UsageError where nothing can be changed, or where sequences
    cannot swap masks.
    """
    b = as_batch("corrupted", b)
    check_word("corruption", how, CORRUPTIONS)
    return _one_changed(m, b, seed) if how == "token" else _resampled(m, b, seed)


def _resampled(m: HookedLoopMDM, b: MaskedBatch, seed: int) -> MaskedBatch:
    if b.sequences.real is not None:
        raise UsageError('corruption "resample" needs sequences without padding; take "token"')
    shown = b.tokens if m.facts.causal else b.sequences.tokens
    clean = shown[torch.from_numpy(donors(b.sequences, seed, 0))]
    return replace(b, tokens=torch.where(m.cfg.hidden(b.tokens), b.tokens, clean), clean=clean)


def _one_changed(m: HookedLoopMDM, b: MaskedBatch, seed: int) -> MaskedBatch:
    where, what = _choices(m, b)
    drawn = row_uniforms(seed, "donors", len(b), 2)
    tokens, clean = b.tokens.clone(), b.clean.clone()
    for row in range(len(b)):
        positions = where[row].nonzero()[:, 0]
        if not len(positions):
            continue
        position = int(positions[int(drawn[row, 0] * len(positions))])
        offered = what(row, position)
        if len(offered):
            tokens[row, position] = clean[row, position] = offered[int(drawn[row, 1] * len(offered))]
    if torch.equal(tokens, b.tokens):
        raise UsageError("corrupted: no sequence has a clean token that can be changed; mask less")
    return replace(b, tokens=tokens, clean=clean)


def _choices(m: HookedLoopMDM, b: MaskedBatch):
    """Where a token may be changed, [batch, pos], and into what, by row and position."""
    clean = b.real & ~b.masked & ~m.cfg.hidden(b.tokens)
    clean = torch.where((clean & b.allowed).any(-1, keepdim=True), clean & b.allowed, clean)
    if m.facts.causal:
        clean = clean & before_next(b).masked  # what stands last is read by nobody
    board = board_of_model(m.cfg)
    if board is not None and b.tokens.shape[1] == board.n_cells:
        other = _unheld(board, b.tokens, clean)
        some = (other.any(-1) & clean).any(-1, keepdim=True)
        where = torch.where(some, other.any(-1) & clean, clean)
        full = torch.nn.functional.one_hot(b.tokens.clamp(max=board.size - 1), board.size) == 0
        other = torch.where(other.any(-1, keepdim=True), other, full)
        return where, lambda row, position: other[row, position].nonzero()[:, 0]
    near = _beside(b.masked) & clean
    where = torch.where(near.any(-1, keepdim=True), near, clean)
    row_of = torch.arange(len(b), device=b.tokens.device)[:, None].expand_as(b.tokens)[clean]
    pool = b.tokens[clean]

    def what(row: int, position: int) -> Tensor:
        others = pool[(row_of != row) & (pool != b.tokens[row, position])]
        return others if len(others) else pool[pool != b.tokens[row, position]]

    return where, what


def _unheld(board: Board, tokens: Tensor, clues: Tensor) -> Bool[Tensor, "batch cell symbol"]:
    """Symbols that a clue could be for all that other clues say, its own left out."""
    held = torch.nn.functional.one_hot(tokens.clamp(max=board.size - 1), board.size) * clues[..., None]
    near = peers(board).to(tokens.device).float()
    return (torch.einsum("cd,bds->bcs", near, held.float()) == 0) & (held == 0)


def _beside(masked: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Positions next to a masked one."""
    found = torch.zeros_like(masked)
    found[:, 1:] |= masked[:, :-1]
    found[:, :-1] |= masked[:, 1:]
    return found


def places(m: HookedLoopMDM, clean: MaskedBatch, corrupt: MaskedBatch) -> dict[str, Bool[Tensor, "batch pos"]]:
    """All positions ("all"), and these in parts: "changed", and the others by what they are to it.

    On a board "box", "row", "column" and "none" are as in `relation_of`; elsewhere "masked" and "clean".
    """
    changed = clean.tokens != corrupt.tokens
    found = {"all": torch.ones_like(changed), "changed": changed}
    board = board_of_model(m.cfg)
    if board is None or clean.tokens.shape[1] != board.n_cells:
        hidden = m.cfg.hidden(clean.tokens)
        return found | {"masked": hidden & ~changed, "clean": ~hidden & ~changed}
    left = ~changed
    for name in RELATIONS[:-1]:
        related = relation_of(board, name).to(changed.device)
        found[name] = (changed.float() @ related.float() > 0) & left
        left = left & ~found[name]
    return found | {"none": left}


def check_pair(by: str, clean: MaskedBatch, corrupt: MaskedBatch) -> Int[Tensor, " batch"]:
    """How many tokens of each sequence differ; UsageError, said by `by`, unless shapes and masks are the same."""
    as_batch(by, clean), as_batch(by, corrupt)
    if clean.tokens.shape != corrupt.tokens.shape:
        raise UsageError(
            f"{by}: clean is {list(clean.tokens.shape)} tokens, corrupted {list(corrupt.tokens.shape)}; "
            "a pair has one shape"
        )
    if not torch.equal(clean.masked, corrupt.masked) or not torch.equal(clean.real, corrupt.real):
        raise UsageError(f"{by}: clean and corrupted hide other positions; a pair has the same masks")
    return (clean.tokens != corrupt.tokens).sum(-1)
