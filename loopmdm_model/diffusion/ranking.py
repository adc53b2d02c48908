"""Orders that reveal an even share at every step, best first by what the model answers."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.model.diffusion.order import Order, StepView, best
from loopmdm.model.errors import UsageError, check_number
from loopmdm.model.information import entropy


class Commit(Order):
    """Base: reveal some of the candidates at every step, best first: an even share, unless `due` says more."""

    def due(self, view: StepView, scores: Tensor) -> Int[Tensor, " batch"]:  # noqa: ARG002
        """How many to reveal now."""
        return view.quota

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:
        """The `due` best; ties go by lot."""
        assert scores is not None
        return best(scores, view.masked, self.due(view, scores), view.uniforms("reveal"))


@dataclass(frozen=True)
class Confidence(Commit):
    """Highest probability of the best token first."""

    reads_logits = True

    def scores(self, log_probs: Tensor) -> Tensor:
        """The best token's probability."""
        return log_probs.amax(-1).exp()


@dataclass(frozen=True)
class HardestFirst(Confidence):
    """Lowest probability of the best token first: the restricted order opposite to confidence."""

    def scores(self, log_probs: Tensor) -> Tensor:
        """Minus the best token's probability."""
        return -super().scores(log_probs)


@dataclass(frozen=True)
class Margin(Commit):
    """Largest gap between the two best probabilities first."""

    reads_logits = True

    def scores(self, log_probs: Tensor) -> Tensor:
        """Difference of probabilities."""
        two = log_probs.topk(2, dim=-1).values.exp()
        return two[:, 0] - two[:, 1]


@dataclass(frozen=True)
class LowEntropy(Commit):
    """Lowest entropy first."""

    reads_logits = True

    def scores(self, log_probs: Tensor) -> Tensor:
        """Minus the entropy, in nats."""
        return -entropy(log_probs)


class ByDraw(Commit):
    """Base: highest probability p(x_i | ids) of the token x_i drawn at each masked position first.

    p is that of the logits drawn from, guided and without suppressed ids, before temperature, top k and top p.
    """

    reads_logits = True
    reads_draws = True

    def drawn_scores(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """The drawn token's probability."""
        return log_probs.gather(-1, tokens[:, None])[:, 0].exp()


@dataclass(frozen=True)
class DrawnConfidence(ByDraw):
    """Highest probability of the drawn token first (LLaDA's low_confidence; arXiv 2502.09992).

    With temperature 0 this is `Confidence`. `log`: ranks by log p, for what adds noise to it.
    """

    log: bool = False

    def drawn_scores(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """The drawn token's probability, or its logarithm."""
        return log_probs.gather(-1, tokens[:, None])[:, 0] if self.log else super().drawn_scores(log_probs, tokens)


@dataclass(frozen=True)
class Noised(Commit):
    """`inner`'s scores plus `temperature` times Gumbel noise g, highest first.

    One position has chance softmax(score / temperature); k are drawn without replacement: Dream's alg_temp (arXiv
    2508.15487). `annealed` multiplies by 1 - (step + 1) / steps: MaskGIT's choice temperature, with
    DrawnConfidence(log=True) as its inner order (arXiv 2202.04200).
    """

    temperature: float = 0.1
    inner: Commit = DrawnConfidence()
    annealed: bool = False
    reads_logits = True
    dial = "temperature"

    def __post_init__(self):
        """A temperature, and an inner order that only ranks: by logits, for an even share at every step."""
        check_number("temperature", self.temperature, 0)
        inner = self.inner
        if not (isinstance(inner, Commit) and inner.reads_logits and _only_ranks(type(inner))):
            raise UsageError(f"noise cannot rank {inner!r:.60}; give an order such as Confidence() as inner=")

    @property
    def reads_draws(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the inner order."""
        return self.inner.reads_draws

    def scores(self, log_probs: Tensor) -> Tensor:
        """As the inner order."""
        return self.inner.scores(log_probs)

    def drawn_scores(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """As the inner order."""
        return self.inner.drawn_scores(log_probs, tokens)

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:
        """The `quota` best with noise."""
        assert scores is not None
        left = view.interval[1] if self.annealed else torch.ones_like(scores[:, :1])
        noise = -(-view.uniforms("noise").clamp(min=1e-300).log()).log()
        return super().choose(view, scores + self.temperature * left * noise)


def _only_ranks(kind: type[Commit]) -> bool:
    """Whether a class differs from `Commit` in its scores alone: all else would be lost inside another order."""
    others = ("choose", "due", "decide", "remask", "candidates", "advance", "n_steps", "check")
    return all(getattr(kind, name) is getattr(Commit, name) for name in others)
