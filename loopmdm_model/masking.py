"""The forward process: which positions become [MASK].

Each maskable position is masked independently with probability t (log-linear schedule,
alpha_t = 1 - t), or an exact share of them is. Positions given as condition (a prompt, a puzzle's
clues, padding) are never masked.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopmdm_model.errors import UsageError
from loopmdm_model.randomness import row_uniforms


@dataclass(frozen=True)
class MaskedBatch:
    """Sequences with some positions hidden.

    `tokens` [batch, pos] is what the model sees, `clean` what was there, `masked` where they are
    hidden; `maskable` where they could have been, `attention_mask` which are real (None: all).
    """

    tokens: Int[Tensor, "batch pos"]
    clean: Int[Tensor, "batch pos"]
    masked: Bool[Tensor, "batch pos"]
    maskable: Bool[Tensor, "batch pos"] | None = None
    attention_mask: Tensor | None = None

    def __post_init__(self):
        """One shape; only maskable positions are hidden; the others show what was there."""
        assert self.tokens.shape == self.clean.shape == self.masked.shape
        assert torch.equal(self.tokens[~self.masked], self.clean[~self.masked])
        if self.maskable is not None:
            assert not bool((self.masked & ~self.maskable).any())

    def __len__(self) -> int:
        """Sequences in the batch."""
        return len(self.tokens)

    @property
    def mask_ratio(self) -> float:
        """Realised share of maskable positions that are masked, over the whole batch."""
        could = (
            self.attention_mask != 0
            if self.maskable is None and self.attention_mask is not None
            else self.maskable
        )
        total = self.masked.numel() if could is None else int(could.sum())
        return int(self.masked.sum()) / total if total else float("nan")

    def rows(self, keep: slice | Tensor) -> "MaskedBatch":
        """The batch restricted to some sequences."""
        maskable = None if self.maskable is None else self.maskable[keep]
        attention_mask = None if self.attention_mask is None else self.attention_mask[keep]
        return MaskedBatch(self.tokens[keep], self.clean[keep], self.masked[keep], maskable, attention_mask)


def check_maskable(tokens: Tensor, maskable: Tensor | None, attention_mask: Tensor | None = None) -> Tensor:
    """The boolean [batch, pos] of positions that may be masked: given ones, less padding."""
    result = torch.ones_like(tokens, dtype=torch.bool)
    for name, given in (("maskable", maskable), ("attention_mask", attention_mask)):
        if given is None:
            continue
        wanted = f"{name} must be a boolean tensor of {tokens.shape[-1]} positions, one row or one a sequence"
        if not isinstance(given, Tensor) or given.is_floating_point():
            raise UsageError(f"{wanted}; got {given.dtype if isinstance(given, Tensor) else type(given).__name__}")
        if given.shape not in (tokens.shape, tokens.shape[-1:], (1, tokens.shape[-1])):
            raise UsageError(f"{wanted}; got shape {list(given.shape)}")
        result = result & (given != 0).expand_as(tokens)
    return result


def mask_tokens(
    tokens: Int[Tensor, "batch pos"],
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
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        raise UsageError("tokens must be an integer tensor [batch, pos]; text goes through HookedLoopMDM.mask")
    if bool((tokens >= mask_token_id).any()):
        raise UsageError(f"tokens must lie below [MASK] ({mask_token_id}): give clean tokens of this model")
    for name, value in (("mask_ratio", mask_ratio), ("t", t)):
        _check_share(name, value, len(tokens))
    allowed = check_maskable(tokens, maskable, attention_mask)
    attention_mask = None if attention_mask is None else attention_mask.expand_as(tokens)
    uniforms = row_uniforms(seed, "positions", *tokens.shape, first_index=first_index, step=step)
    uniforms = uniforms.to(tokens.device)
    if t is not None:
        chance = torch.as_tensor(t, dtype=torch.float64, device=tokens.device).reshape(-1, 1)
        masked = (uniforms < chance) & allowed
    else:
        total = allowed.sum(-1)
        count = (float(mask_ratio or 0) * total).round().long()
        masked = pick_positions(uniforms, allowed, count.clamp(min=1 if mask_ratio else 0))
    return hide(tokens, masked, mask_token_id, allowed, attention_mask)


def _check_share(name: str, value: float | Tensor | None, n: int) -> None:
    if value is None:
        return
    if not isinstance(value, int | float | Tensor):
        raise UsageError(f"{name} must be a number, got {value!r}")
    shares = torch.as_tensor(value)
    if shares.numel() not in (1, n) or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise UsageError(f"{name} must lie in 0..1 (one number, or t= one a sequence), got {value}")


def pick_positions(uniforms: Tensor, allowed: Tensor, count: Tensor) -> Bool[Tensor, "batch pos"]:
    """The `count` [batch] allowed positions of each row with the smallest uniforms."""
    rank = uniforms.masked_fill(~allowed, 2.0).argsort(dim=-1).argsort(dim=-1)
    return (rank < count[:, None]) & allowed


def hide(
    tokens: Tensor,
    masked: Tensor,
    mask_token_id: int,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> MaskedBatch:
    """Put [MASK] at the `masked` positions."""
    return MaskedBatch(tokens.masked_fill(masked, mask_token_id), tokens, masked, maskable, attention_mask)
