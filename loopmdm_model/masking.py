"""The forward process: which positions become [MASK].

Each maskable position is masked independently with probability t (log-linear schedule,
alpha_t = 1 - t), or an exact share of them is. Positions given as condition (a prompt, a puzzle's
clues, padding) are never masked.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch, Sequences


def mask_tokens(
    tokens: Int[Tensor, "batch pos"] | Sequences,
    mask_token_id: int,
    *,
    mask_ratio: float | None = None,
    t: float | Tensor | None = None,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    first_index: int = 0,
    step: int = 0,
) -> MaskedBatch:
    """Hide an exact share (`mask_ratio`) or each position with probability `t` (a number or [batch]).

    The exact count is round(mask_ratio x maskable), at least 1; a ratio of 0 hides nothing.
    """
    if (mask_ratio is None) == (t is None):
        raise UsageError("give exactly one of mask_ratio= (an exact share) and t= (a probability)")
    check_count("mask_token_id", mask_token_id, least=0)
    sequences = Sequences.of(tokens, maskable, attention_mask)
    _check_clean(sequences, mask_token_id)
    for name, value in (("mask_ratio", mask_ratio), ("t", t)):
        _check_share(name, value, len(sequences))
    clean, allowed = sequences.tokens, sequences.allowed
    first_index = check_count("first_index", first_index, least=0) + sequences.first
    uniforms = row_uniforms(seed, "positions", *clean.shape, first_index=first_index, step=step)
    uniforms = uniforms.to(clean.device)
    if t is not None:
        chance = torch.as_tensor(t, dtype=torch.float64, device=clean.device).reshape(-1, 1)
        masked = (uniforms < chance) & allowed
    else:
        count = (float(mask_ratio or 0) * sequences.lengths).round().long()
        masked = pick_positions(uniforms, allowed, count.clamp(min=1 if mask_ratio else 0))
    return hide(replace(sequences, maskable=allowed), masked, mask_token_id)


def _check_clean(sequences: Sequences, mask_token_id: int) -> None:
    if bool((sequences.tokens == mask_token_id).any()):
        raise UsageError(f"tokens already hold [MASK] ({mask_token_id}); give clean tokens of this model")
    if bool((sequences.tokens < 0).any()):
        raise UsageError(
            f"tokens hold the negative id {int(sequences.tokens.min())}; give clean tokens of this model"
        )


def _check_share(name: str, value: float | Tensor | None, n: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise UsageError(f"{name} must be a number, got {value!r}")
    shares = torch.as_tensor(value, dtype=torch.float64)  # in float32 a tiny negative number would be 0
    if shares.numel() not in (1, n) or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise UsageError(f"{name} must lie in 0..1 (one number, or t= one a sequence), got {value}")


def pick_positions(uniforms: Tensor, allowed: Tensor, count: Tensor) -> Bool[Tensor, "batch pos"]:
    """The `count` [batch] allowed positions of each row with the smallest uniforms."""
    rank = uniforms.masked_fill(~allowed, 2.0).argsort(dim=-1).argsort(dim=-1)
    return (rank < count[:, None]) & allowed


def hide(clean: Tensor | Sequences, masked: Tensor, mask_token_id: int) -> MaskedBatch:
    """Put [MASK] at the `masked` positions."""
    s = clean if isinstance(clean, Sequences) else Sequences(clean)
    return MaskedBatch(
        s.tokens.masked_fill(masked, mask_token_id), s.tokens, masked, s.maskable, s.real, s.clusters, s.place
    )
