"""Orders that reveal as many positions at a step as the model is sure enough of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loopmdm.model.diffusion.order import StepView
from loopmdm.model.diffusion.ranking import ByDraw, LowEntropy
from loopmdm.model.errors import check_number


class InParallel(ByDraw):
    """Base: as many at a step as are sure enough, and at least one; `steps` sets nothing."""

    def n_steps(self, steps: int, most: int) -> int:  # noqa: ARG002
        """One step a position, if none goes with another; steps without a masked position run no forward."""
        return most


@dataclass(frozen=True)
class Threshold(InParallel):
    """All whose drawn token is more probable than `threshold`, else the best (Fast-dLLM; arXiv 2505.22618).

    Threshold 0 reveals everything at once, 1 one position a step.
    """

    threshold: float = 0.9
    dial = "threshold"

    def __post_init__(self):
        """A probability."""
        check_number("threshold", self.threshold, 0, 1)

    def due(self, view: StepView, scores: Tensor) -> Tensor:
        """How many are above."""
        return ((scores > self.threshold) & view.masked).sum(-1).clamp(min=1)


@dataclass(frozen=True)
class Factor(InParallel):
    """The n best, the largest n with (n + 1)(1 - c_n) < `factor` (Fast-dLLM; arXiv 2505.22618).

    c_1 >= c_2 .. are the probabilities of the drawn tokens. Below factor 1 the best joint tokens are those of one
    at a time. Factor 0 reveals one position a step, infinity everything.
    """

    factor: float = 1.0
    dial = "factor"

    def __post_init__(self):
        """Not negative."""
        check_number("factor", self.factor, 0)

    def due(self, view: StepView, scores: Tensor) -> Tensor:
        """The left side grows with n: those below are the first."""
        ordered = scores.masked_fill(~view.masked, float("-inf")).sort(dim=-1, descending=True).values
        place = torch.arange(2, scores.shape[1] + 2, device=scores.device)
        return (place * (1 - ordered) < self.factor).sum(-1).minimum(view.masked.sum(-1)).clamp(min=1)


@dataclass(frozen=True)
class EntropyBound(LowEntropy):
    """The lowest-entropy positions with sum H_i - max H_i <= `gamma` nats (EB-Sampler; arXiv 2505.24857).

    The left side bounds what drawing them independently misses of their joint law. As the order looks at no
    drawn token, gamma 0 samples the model's law with one position a step (several where all but one are certain);
    infinity reveals everything at once. `steps` sets nothing.
    """

    gamma: float = 0.1
    dial = "gamma"

    def __post_init__(self):
        """Not negative."""
        check_number("gamma", self.gamma, 0)

    def n_steps(self, steps: int, most: int) -> int:  # noqa: ARG002
        """One step a position, if none goes with another; steps without a masked position run no forward."""
        return most

    def due(self, view: StepView, scores: Tensor) -> Tensor:
        """Those for which the entropies before theirs sum to at most gamma."""
        entropies = (-scores).clamp(min=0).masked_fill(~view.masked, float("inf")).sort(dim=-1).values
        before = torch.cat([torch.zeros_like(entropies[:, :1]), entropies[:, :-1].cumsum(-1)], dim=-1)
        return (before <= self.gamma).sum(-1).minimum(view.masked.sum(-1)).clamp(min=1)
