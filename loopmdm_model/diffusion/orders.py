"""In which order a sampler fills positions.

An order looks at a `StepView` and chooses which masked positions to reveal. Those that need no
logits choose first, so that only what is drawn is ever unembedded; those that rank by the model's
confidence (`reads_logits`) see the log-probabilities of their candidates. Of these, some rank by the token that
was drawn for each candidate (`reads_draws`): good decoding, but no longer the model's law, as what is revealed are
the luckier draws. To add one, subclass `Order`.

What others call them: LLaDA's low_confidence is `DrawnConfidence`, its random `EvenRandom`; Dream's origin is
`Ancestral`, maskgit_plus `DrawnConfidence`, topk_margin `Margin`, entropy `LowEntropy`, alg_temp `Noised`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count, check_number, unknown_name
from loopmdm.model.information import entropy

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
    hides = False
    """Whether it may hide filled positions again."""
    dial = ""
    """The field that a number sets in an order's name, as in "remask:0.2"."""

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

    def advance(self, view: StepView) -> Float[Tensor, " batch"]:
        """The diffusion time after the step; NaN for orders that have none."""
        return torch.full_like(view.time, float("nan"))


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
class EvenRandom(Order):
    """An even share of the masked positions at every step, at random (LLaDA's random; arXiv 2502.09992)."""

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:  # noqa: ARG002
        """`quota` masked positions, all alike."""
        return lowest(view.uniforms("reveal"), view.masked, view.quota)


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

    p is the model's own, whatever the temperature that drew.
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
        """A temperature, and an inner order that ranks by logits and reveals an even share."""
        check_number("temperature", self.temperature, 0)
        inner = self.inner
        if not (isinstance(inner, Commit) and inner.reads_logits and type(inner).due is Commit.due):
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


@dataclass(frozen=True)
class PathPlanning(ByDraw):
    """All but the worst positions are kept, masked ones and filled ones alike (P2; Peng et al., arXiv 2502.03540).

    After step k of K floor((1 - k / K) N) of the N free positions are masked: those with the lowest score, log p
    of the drawn token where it is masked and `eta` log p of the token that is there where it is filled (the model
    is its own planner). eta 0 never hides a filled position again, which is `DrawnConfidence`; large eta hides
    whatever is not certain.
    """

    eta: float = 1.0
    hides = True
    dial = "eta"

    def __post_init__(self):
        """Finite, not negative."""
        check_number("eta", self.eta, 0, 1e6)

    def drawn_scores(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of the token drawn, or there already."""
        return log_probs.gather(-1, tokens[:, None])[:, 0]

    def candidates(self, view: StepView) -> Tensor:
        """All free positions."""
        return view.free

    def _kept(self, view: StepView, scores: Tensor) -> Bool[Tensor, "batch pos"]:
        """What is filled after the step; of equals the filled ones stay."""
        n_free = view.free.sum(-1)
        kept = n_free - n_free * (view.steps - view.step - 1) // view.steps
        planned = torch.where(view.masked, scores, self.eta * scores.clamp(min=-1e300))  # 0 * inf is no number
        return best(planned, view.free, kept, (view.uniforms("reveal") + view.masked) / 2)

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:
        """Masked ones among the best."""
        assert scores is not None
        return view.masked & self._kept(view, scores)

    def remask(self, view: StepView, scores: Tensor | None = None) -> Tensor:
        """Filled ones not among the best."""
        assert scores is not None
        return view.free & ~view.masked & ~self._kept(view, scores)


@dataclass(frozen=True)
class FixedOrder(Commit):
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


@dataclass(frozen=True)
class Blocks(Order):
    """Semi-autoregressive: blocks of `size` free positions one after the other, `inner` within a block.

    Blocks go left to right, or with `shuffled` in an order drawn for each sequence. The steps are shared
    equally by the blocks.
    """

    size: int
    inner: Order = Confidence()
    shuffled: bool = False

    def __post_init__(self):
        """A size, and an inner order that keeps what it revealed."""
        check_count("block size", self.size)
        if not isinstance(self.inner, Order) or isinstance(self.inner, Blocks) or self.inner.hides:
            raise UsageError(f"blocks cannot hold {type(self.inner).__name__}; give a plain order as inner=")

    @property
    def reads_logits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the inner order."""
        return self.inner.reads_logits

    @property
    def reads_draws(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the inner order."""
        return self.inner.reads_draws

    def check(self, length: int) -> None:
        """As the inner order."""
        self.inner.check(length)

    def n_steps(self, steps: int, most: int) -> int:
        """As many as asked for, unless the inner order has its own number."""
        blocks = -(-most // self.size)
        own = self.inner.n_steps(0, self.size)  # 0: it takes what it is given
        if not own and blocks > steps:
            raise UsageError(f"{blocks} blocks need at least as many steps, got {steps}; raise steps or the size")
        return blocks * own or steps

    def _part(self, view: StepView) -> StepView:
        """The view of the current block; a sequence with fewer blocks has more steps for each."""
        blocks = (-(-view.free.sum(-1) // self.size)).clamp(min=1)
        each = view.steps // blocks
        own = self.inner.n_steps(0, self.size)
        each = torch.full_like(each, own) if own else each
        number = (view.free.cumsum(-1) - 1) // self.size
        if self.shuffled:  # block b of a sequence is filled in place rank(b)
            lots = view.uniforms("blocks")
            absent = torch.arange(lots.shape[1], device=lots.device) >= blocks[:, None]
            rank = lots.masked_fill(absent, 2.0).argsort(-1).argsort(-1)
            number = rank.gather(1, number.clamp(min=0))
        now = view.free & (number == (view.step // each)[:, None])
        return replace(view, masked=view.masked & now, free=now, step=view.step % each, steps=each)

    def candidates(self, view: StepView) -> Tensor:
        """Masked positions of the current block."""
        return self.inner.candidates(self._part(view))

    def scores(self, log_probs: Tensor) -> Tensor:
        """As the inner order."""
        return self.inner.scores(log_probs)

    def drawn_scores(self, log_probs: Tensor, tokens: Tensor) -> Tensor:
        """As the inner order."""
        return self.inner.drawn_scores(log_probs, tokens)

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:
        """As the inner order, within the block."""
        return self.inner.choose(self._part(view), scores)


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
    schedule: Literal["cap", "rescale", "confidence", "loop"] = "cap"
    plateau: tuple[float, float, float] = (0.55, 0.05, 0.9)
    hides = True
    dial = "eta"

    def __post_init__(self):
        """A share, a known schedule, and times in order."""
        if self.schedule not in ("cap", "rescale", "confidence", "loop"):
            raise UsageError(f"schedule must be cap, rescale, confidence or loop, got {self.schedule!r}")
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


ORDERS: dict[str, Order] = {
    "random": Ancestral(),
    "even-random": EvenRandom(),
    "first-hitting": FirstHitting(),
    "confidence": Confidence(),
    "drawn-confidence": DrawnConfidence(),
    "margin": Margin(),
    "entropy": LowEntropy(),
    "hardest-first": HardestFirst(),
    "threshold": Threshold(),
    "factor": Factor(),
    "entropy-bound": EntropyBound(),
    "noised": Noised(),
    "maskgit": Noised(4.5, DrawnConfidence(log=True), annealed=True),
    "left-to-right": FixedOrder(),
    "row-major": FixedOrder(),
    "one-shot": OneShot(),
    "remask": Remask(),
    "remask-confidence": Remask(schedule="confidence"),
    "remask-loop": Remask(schedule="loop"),
    "path-planning": PathPlanning(),
}
BLOCKS = ("blocks", "random-blocks")


def parse_order(text: str) -> Order:
    """The order written as NAME, NAME:NUMBER where it has a number, or blocks:SIZE[:NAME[:NUMBER]]."""
    kind, _, rest = text.partition(":")
    if kind in BLOCKS:
        size, _, inner = rest.partition(":")
        if not (size.isascii() and size.isdigit()):
            raise UsageError(f"{kind} needs a size, such as {kind}:8, got {text!r}")
        size = check_count("the size of blocks", int(size[:99]))
        return Blocks(size, parse_order(inner) if inner else Confidence(), shuffled=kind == "random-blocks")
    dialled = ORDERS[kind].dial if kind in ORDERS else ""
    if kind not in ORDERS or (":" in text and not dialled):
        raise unknown_name("order", text, [*ORDERS, *(f"{kind}:SIZE" for kind in BLOCKS)])
    if ":" not in text:
        return ORDERS[kind]
    try:
        number = float(rest)
    except ValueError:
        raise UsageError(f"{dialled} in {text!r} is no number; write {kind}:0.5") from None
    return replace(ORDERS[kind], **{dialled: number})  # pyright: ignore[reportArgumentType]


def as_order(order: Any, length: int) -> Order:
    """The order meant by a name (see `parse_order`), a permutation, or an Order."""
    if isinstance(order, str):
        order = parse_order(order)
    if isinstance(order, Tensor):
        order = order.tolist()
    if isinstance(order, Sequence):
        if not all(isinstance(position, int) for position in order):
            raise UsageError(f"an order must hold the positions 0..{length - 1} as integers, got {order!r:.80}")
        order = FixedOrder(tuple(order) or (-1,))
    if not isinstance(order, Order):
        raise UsageError(f"order must be a name, a permutation or an Order, got {order!r}")
    order.check(length)
    return order


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
