"""In which order a sampler fills positions.

An order looks at a `StepView` and chooses which masked positions to reveal. Those that need no
logits choose first, so that only what is drawn is ever unembedded; those that rank by the model's
confidence (`reads_logits`) see the log-probabilities of their candidates. To add one, subclass `Order`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count, unknown_name

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

    def n_steps(self, steps: int, most: int) -> int:  # noqa: ARG002
        """Steps to take if the caller asks for `steps` and a sequence has at most `most` free positions."""
        return steps

    def check(self, length: int) -> None:
        """Refuse a length that the order cannot fill."""

    def candidates(self, view: StepView) -> Bool[Tensor, "batch pos"]:
        """The masked positions that may be revealed at this step."""
        return view.masked

    def scores(self, log_probs: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
        """For `reads_logits`: a number per candidate; the highest are revealed first."""
        raise NotImplementedError

    def choose(self, view: StepView, scores: Tensor | None) -> Bool[Tensor, "batch pos"]:
        """Which candidates to reveal; `scores` [batch, pos] is None unless the order reads logits."""
        raise NotImplementedError

    def remask(self, view: StepView) -> Bool[Tensor, "batch pos"] | None:  # noqa: ARG002
        """Which filled free positions to hide again, decided on the ids before the step."""
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
    """Base: reveal an even share of the candidates at every step, best first."""

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:
        """The `quota` best; ties go by lot."""
        assert scores is not None
        return best(scores, view.masked, view.quota, view.uniforms("reveal"))


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
        return (log_probs.exp() * log_probs.clamp(min=-1e9)).sum(-1)


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
        if not isinstance(self.inner, Order) or isinstance(self.inner, Blocks | Remask):
            raise UsageError(f"blocks cannot hold {type(self.inner).__name__}; give a plain order as inner=")

    @property
    def reads_logits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the inner order."""
        return self.inner.reads_logits

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

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:
        """As the inner order, within the block."""
        return self.inner.choose(self._part(view), scores)


@dataclass(frozen=True)
class Remask(Ancestral):
    """Ancestral steps that also hide filled positions again (ReMDM; Wang et al. 2025, arXiv 2503.00307).

    From t to s a filled position is hidden with chance sigma, at most s / (1 - t), and reveals make up for it, so
    that the share of masked positions stays s: `schedule` "cap": min(eta, that); "rescale": eta times that.
    "confidence" shares the rescaled chance out by softmax of minus the probability with which each was drawn,
    and does not make up for it.
    """

    eta: float = 0.1
    schedule: Literal["cap", "rescale", "confidence"] = "cap"

    def __post_init__(self):
        """A share, and a known schedule."""
        if isinstance(self.eta, bool) or not 0 <= self.eta <= 1:
            raise UsageError(f"eta must lie in 0..1, got {self.eta!r}")
        if self.schedule not in ("cap", "rescale", "confidence"):
            raise UsageError(f"schedule must be cap, rescale or confidence, got {self.schedule!r}")

    def _sigma(self, view: StepView) -> Float[Tensor, "batch one"]:
        t, s = view.interval
        most = (s / (1 - t)).clamp(0.0, 1.0)  # at t = 1 nothing is filled
        return most.clamp(max=self.eta) if self.schedule == "cap" else self.eta * most

    def choose(self, view: StepView, scores: Tensor | None) -> Tensor:
        """Reveal with chance ((1 - s) - (1 - sigma)(1 - t)) / t."""
        if self.schedule == "confidence":
            return super().choose(view, scores)
        t, s = view.interval
        chance = ((1 - s) - (1 - self._sigma(view)) * (1 - t)) / t
        last = (view.step + 1 == view.steps)[:, None]
        return view.masked & (last | (view.uniforms("reveal") < chance))

    def remask(self, view: StepView) -> Tensor:
        """Independently with chance sigma."""
        filled, chance = view.free & ~view.masked, self._sigma(view)
        if self.schedule == "confidence":
            doubt = (-view.confidence).masked_fill(~filled, float("-inf")).softmax(-1).nan_to_num(0.0)
            chance = chance * doubt
        return filled & (view.uniforms("remask") < chance)


ORDERS: dict[str, Order] = {
    "random": Ancestral(),
    "first-hitting": FirstHitting(),
    "confidence": Confidence(),
    "margin": Margin(),
    "entropy": LowEntropy(),
    "hardest-first": HardestFirst(),
    "left-to-right": FixedOrder(),
    "row-major": FixedOrder(),
    "one-shot": OneShot(),
    "remask": Remask(),
}


def as_order(order: Any, length: int) -> Order:
    """The order meant by a name, "blocks:SIZE", "random-blocks:SIZE", a permutation, or an Order."""
    if isinstance(order, str):
        kind, _, size = order.partition(":")
        if kind in ("blocks", "random-blocks"):
            if not (size.isascii() and size.isdigit()):
                raise UsageError(f"{kind} needs a size, such as {kind}:8, got {order!r}")
            return Blocks(int(size), shuffled=kind == "random-blocks")
        if order not in ORDERS:
            raise unknown_name("order", order, [*ORDERS, "blocks:SIZE", "random-blocks:SIZE"])
        return ORDERS[order]
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
