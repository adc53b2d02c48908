"""What layer applications need beside their input: who is masked, who is real, who is held."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Own = TypeVar("Own", bound="Context")


@dataclass(slots=True)
class Context:
    """The sequences that a forward runs on; rows can be dropped as sequences stop.

    `tokens` [batch, pos]; `mask_token_id` None if the model has no [MASK]; `keys` [batch, pos] tells real tokens
    from padding, None: all are real; `held` [batch, pos] which tokens skip the looped layers, None: none does.
    """

    tokens: Int[Tensor, "batch pos"]
    mask_token_id: int | None
    keys: Bool[Tensor, "batch pos"] | None
    held: Bool[Tensor, "batch pos"] | None = None

    @property
    def masked(self) -> Bool[Tensor, "batch pos"]:
        """Which positions hold [MASK]."""
        if self.mask_token_id is None:
            return torch.zeros_like(self.tokens, dtype=torch.bool)
        return self.tokens == self.mask_token_id

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Which positions are not padding."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.keys is None else self.keys

    def rows(self: Own, keep: Tensor) -> Own:
        """The context of the sequences `keep` (index or boolean [batch])."""
        keys = None if self.keys is None else self.keys[keep]
        held = None if self.held is None else self.held[keep]
        return replace(self, tokens=self.tokens[keep], keys=keys, held=held)

    def hold(self: Own, held: Bool[Tensor, "batch pos"]) -> Own:
        """The context with some tokens held."""
        return replace(self, held=held)
