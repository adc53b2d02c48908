"""Exponential moving average of the parameters, also where they are sharded over processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Shadows of a (wrapped) model's parameters; `n` updates so far.

    The first update copies; then the decay warms up as (1 + n) / (10 + n) to its final value.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.parameters, self.decay, self.n = list(model.parameters()), decay, 0
        self.shadows: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the parameters as they are."""
        now = [parameter.detach() for parameter in self.parameters]
        weight = 1.0 if self.n == 0 else 1 - min(self.decay, (1 + self.n) / (10 + self.n))
        torch._foreach_lerp_(self.shadows, now, weight)
        self.n += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the averages inside, its own parameters again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, shadow in zip(self.parameters, self.shadows, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)
