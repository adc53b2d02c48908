"""What every order has: it looks at a `StepView` and chooses which masked positions to reveal.

Those that need no logits choose first, so that only what is drawn is ever unembedded; those that rank by the
model's confidence (`reads_logits`) see the log-probabilities of their candidates. Of these, some rank by the token
that was drawn for each candidate (`reads_draws`): good decoding, but no longer the model's law, as what is
revealed are the luckier draws.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TIE = 2e-6
"""Runs of scores closer than this are ties: equal in exact arithmetic, apart by rounding (all-masked input)."""


@dataclass(frozen=True)
class StepView:
    """What an order may look at before step `step` of `steps` (both [batch]), for a batch of sequences.

    `masked` [batch, pos] is still to be filled, `free` [batch, pos] everything that is generated (clues and
    prompts excepted); `time` [batch] is the diffusion time, 1 at the start; `confidence` [batch, pos] the
    probability with which a filled position was drawn. `uniforms(stream)` gives [batch, pos] in [0, 1),
    fixed by (seed, sequence, step).
    """

    step: Int[Tensor, " batch"]
    steps: Int[Tensor, " batch"]
    masked: Bool[Tensor, "batch pos"]
    free: Bool[Tensor, "batch pos"]
    time: Float[Tensor, " batch"]
    confidence: Float[Tensor, "batch pos"]
    uniforms: Callable[[str], Tensor]

    @property
    def quota(self) -> Int[Tensor, " batch"]:
        """Reveals due now: what is left, shared evenly by the steps left, rounded up."""
        return -(-self.masked.sum(-1) // (self.steps - self.step))

    @property
    def interval(self) -> tuple[Float[Tensor, "batch one"], Float[Tensor, "batch one"]]:
        """Diffusion times t and s < t of the step, of equal steps from 1 to 0; [batch, 1]."""
        step, steps = self.step.double()[:, None], self.steps.double()[:, None]
        return 1 - step / steps, 1 - (step + 1) / steps


class Order:
    """Base of all orders."""

    reads_logits = False
    reads_draws = False
    """Whether it ranks candidates by the token drawn for each; such an order reads logits, too."""
    dial = ""
    """The field that a number sets in an order's name, as in "remask:0.2"."""

    @property
    def hides(self) -> bool:
        """Whether it may hide filled positions again."""
        own = type(self)
        return own.remask is not Order.remask or own.decide is not Order.decide

    def n_steps(self, steps: int, most: int) -> int:  # noqa: ARG002
        """Steps to take if the caller asks for `steps` and a sequence has at most `most` free positions."""
        return steps

    def check(self, length: int) -> None:
        """Refuse a length that the order cannot fill."""

    def candidates(self, view: StepView) -> Bool[Tensor, "batch pos"]:
        """The positions to score: masked ones that may be revealed, and filled ones that may be hidden."""
        return view.masked

    def scores(self, log_probs: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
        """For `reads_logits`: a number per candidate; the highest are revealed first."""
        raise NotImplementedError

    def drawn_scores(
        self,
        log_probs: Float[Tensor, "row d_vocab"],
        tokens: Int[Tensor, " row"],
    ) -> Float[Tensor, " row"]:
        """For `reads_draws`: as `scores`, knowing the token drawn for each candidate, or that fills it."""
        raise NotImplementedError

    def choose(self, view: StepView, scores: Tensor | None) -> Bool[Tensor, "batch pos"]:
        """Which candidates to reveal; `scores` [batch, pos] is None unless the order reads logits."""
        raise NotImplementedError

    def remask(
        self,
        view: StepView,  # noqa: ARG002
        scores: Tensor | None = None,  # noqa: ARG002
    ) -> Bool[Tensor, "batch pos"] | None:
        """Which filled free positions to hide again, decided on the ids before the step; `scores` as `choose`."""
        return None

    def decide(self, view: StepView, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What to reveal and what to hide again; to override where one computation gives both."""
        return self.choose(view, scores), self.remask(view, scores)

    def advance(self, view: StepView) -> Float[Tensor, " batch"]:
        """The diffusion time after the step; NaN for orders that have none."""
        return torch.full_like(view.time, float("nan"))


def lowest(values: Tensor, among: Bool[Tensor, "batch pos"], count: Tensor) -> Bool[Tensor, "batch pos"]:
    """The `count` [batch] positions of each row with the lowest values, of those `among`."""
    rank = values.masked_fill(~among, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (rank < count[:, None]) & among


def best(scores: Tensor, among: Tensor, count: Tensor, lots: Tensor) -> Bool[Tensor, "batch pos"]:
    """The `count` positions with the highest scores; within runs of near-equal ones the lowest lots go first."""
    ordered, index = scores.double().masked_fill(~among, float("-inf")).sort(dim=-1, descending=True)
    apart = ordered[:, :-1] - ordered[:, 1:] > TIE
    group = torch.cat([torch.zeros_like(among[:, :1]), apart], dim=1).cumsum(-1)
    place = torch.empty_like(ordered).scatter(1, index, group + lots.gather(1, index))
    return lowest(place, among, count)
