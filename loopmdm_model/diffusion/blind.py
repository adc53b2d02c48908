"""Orders that look at no logits: by chance, by a permutation, or all at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loopmdm.model.diffusion.order import Order, StepView, lowest
from loopmdm.model.errors import UsageError


@dataclass(frozen=True)
class Ancestral(Order):
    """The reverse diffusion in `steps` equal time steps: from t to s each is revealed with chance (t - s) / t."""

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:  # noqa: ARG002
        """Independently; everything at the last step."""
        return view.masked & (view.uniforms("reveal") * (view.steps - view.step)[:, None] < 1)

    def advance(self, view: StepView) -> Tensor:
        """1 - (step + 1) / steps."""
        return view.interval[1][:, 0]


@dataclass(frozen=True)
class FirstHitting(Order):
    """One token at a time at the exact times of the reverse diffusion (Zheng et al. 2024, arXiv 2409.02908).

    Takes as many steps as there are positions to fill, whatever `steps` says; has no discretisation error.
    """

    def n_steps(self, steps: int, most: int) -> int:  # noqa: ARG002
        """One step a position."""
        return most

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:  # noqa: ARG002
        """One masked position, all alike."""
        return lowest(view.uniforms("reveal"), view.masked, torch.ones_like(view.masked.sum(-1)))

    def advance(self, view: StepView) -> Tensor:
        """The next hit among m masked positions: t * u^(1/m)."""
        left = view.masked.sum(-1)
        later = view.time * (1 - view.uniforms("times")[:, 0]) ** (1 / left.clamp(min=1))
        return torch.where(left > 0, later, view.time)


@dataclass(frozen=True)
class EvenRandom(Order):
    """An even share of the masked positions at every step, at random (LLaDA's random; arXiv 2502.09992)."""

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:  # noqa: ARG002
        """`quota` masked positions, all alike."""
        return lowest(view.uniforms("reveal"), view.masked, view.quota)


@dataclass(frozen=True)
class FixedOrder(Order):
    """A permutation of all positions, first to last; () is left to right (row-major on a board)."""

    permutation: tuple[int, ...] = ()

    def check(self, length: int) -> None:
        """Every position exactly once."""
        if self.permutation and sorted(self.permutation) != list(range(length)):
            raise UsageError(f"an order of {length} positions must hold each of 0..{length - 1} exactly once")

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:  # noqa: ARG002
        """The next `quota` of the permutation."""
        place = torch.arange(view.masked.shape[1], device=view.masked.device)
        if self.permutation:
            place = torch.tensor(self.permutation, device=place.device).argsort()
        return lowest(place.double().expand(view.masked.shape), view.masked, view.quota)


@dataclass(frozen=True)
class OneShot(Order):
    """Everything at once."""

    def n_steps(self, steps: int, most: int) -> int:  # noqa: ARG002
        """One."""
        return 1

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:  # noqa: ARG002
        """All."""
        return view.masked
