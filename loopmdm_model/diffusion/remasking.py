"""Orders that hide filled positions again."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.model.diffusion.blind import Ancestral
from loopmdm.model.diffusion.order import Order, StepView, best
from loopmdm.model.errors import UsageError, check_number, check_word

Schedule = Literal["cap", "rescale", "confidence", "loop"]


@dataclass(frozen=True)
class PathPlanning(Order):
    """All but the worst positions are kept, masked ones and filled ones alike (P2; Peng et al., arXiv 2502.03540).

    After step k of K floor((1 - k / K) N) of the N free positions are masked: those with the lowest score, log p
    of the drawn token where it is masked and `eta` log p of the token that is there where it is filled (the model
    is its own planner). eta 0 never hides a filled position again; where K divides N that is `DrawnConfidence`,
    which else rounds its shares up where this rounds down. Large eta hides whatever is not certain.
    """

    eta: float = 1.0
    reads_logits = True
    reads_draws = True
    dial = "eta"

    def __post_init__(self):
        """Finite, not negative."""
        check_number("eta", self.eta, 0, 1e6)

    def drawn_scores(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of the token drawn, or there already."""
        return log_probs.gather(-1, tokens[:, None])[:, 0]

    def candidates(self, view: StepView) -> Tensor:
        """All free positions, while something is masked: from then on all is kept."""
        return view.free & view.masked.any(-1, keepdim=True)

    def decide(self, view: StepView, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """Masked ones among the best, and filled ones not among them; of equals the filled ones stay."""
        assert scores is not None
        n_free = view.free.sum(-1)
        count = n_free - n_free * (view.steps - view.step - 1) // view.steps
        planned = torch.where(view.masked, scores, self.eta * scores.clamp(min=-1e300))  # 0 * inf is no number
        kept = best(planned, view.free, count, (view.uniforms("reveal") + view.masked) / 2)
        return view.masked & kept, view.free & ~view.masked & ~kept


@dataclass(frozen=True)
class Remask(Ancestral):
    """Ancestral steps that also hide filled positions again (ReMDM; Wang et al. 2025, arXiv 2503.00307).

    From t to s a filled position is hidden with chance sigma, at most s / (1 - t), and reveals make up for it, so
    that the share of masked positions stays s: `schedule` "cap": min(eta, that); "rescale": eta times that.
    "confidence" shares the rescaled chance out by softmax of minus the probability with which each was drawn,
    and does not make up for it. "loop" fills without hiding until time t_on, when a share alpha_on is filled;
    holds that share until t_off while it hides with chance min(eta, that); then fills the rest. `plateau` is
    (t_on, t_off, alpha_on).

    `eta` None is 1 with "confidence", 0.02 with "loop" (the authors' defaults), else 0.1.
    """

    eta: float | None = None
    schedule: Schedule = "cap"
    plateau: tuple[float, float, float] = (0.55, 0.05, 0.9)
    dial = "eta"

    def __post_init__(self):
        """A share, a known schedule, and times in order."""
        check_word("schedule", self.schedule, get_args(Schedule))
        if self.eta is None:
            object.__setattr__(self, "eta", {"confidence": 1.0, "loop": 0.02}.get(self.schedule, 0.1))
        check_number("eta", self.eta, 0, 1)
        on, off, filled = self.plateau
        if not (0 < off <= on < 1 and 0 < filled < 1):
            raise UsageError(
                f"plateau must be (t_on, t_off, alpha_on) with 0 < t_off <= t_on < 1, got {self.plateau!r}"
            )

    def _shares(self, view: StepView) -> tuple[Float[Tensor, "batch one"], Float[Tensor, "batch one"]]:
        """Shares of masked positions before and after the step."""
        t, s = view.interval
        if self.schedule != "loop":
            return t, s
        on, off, filled = self.plateau
        before, after = (
            torch.where(at > on, 1 - (1 - at) * filled / (1 - on), at.clamp(max=off) * (1 - filled) / off)
            for at in (t, s)
        )
        return before, after

    def _sigma(self, view: StepView) -> Float[Tensor, "batch one"]:
        assert self.eta is not None
        t, s = self._shares(view)
        most = (s / (1 - t)).clamp(0.0, 1.0)  # at t = 1 nothing is filled
        if self.schedule in ("cap", "loop"):
            return most.clamp(max=self.eta) * (self.schedule == "cap" or self._holds(view))
        return self.eta * most

    def _holds(self, view: StepView) -> Bool[Tensor, "batch one"]:
        """Whether the step begins on the plateau; times of equal steps are rounded."""
        time, (on, off, _) = view.interval[0], self.plateau
        return (time < on + 1e-9) & (time > off + 1e-9)

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:
        """Reveal with chance ((1 - s) - (1 - sigma)(1 - t)) / t."""
        if self.schedule == "confidence":
            return super().choose(view, scores)
        t, s = self._shares(view)
        chance = ((1 - s) - (1 - self._sigma(view)) * (1 - t)) / t
        last = (view.step + 1 == view.steps)[:, None]
        return view.masked & (last | (view.uniforms("reveal") < chance))

    def remask(self, view: StepView, scores: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Independently with chance sigma."""
        filled, chance = view.free & ~view.masked, self._sigma(view)
        if self.schedule == "confidence":
            doubt = (-view.confidence).masked_fill(~filled, float("-inf")).softmax(-1).nan_to_num(0.0)
            chance = chance * doubt
        return filled & (view.uniforms("remask") < chance)

    def advance(self, view: StepView) -> Tensor:
        """The share of masked positions after the step."""
        return self._shares(view)[1][:, 0]
