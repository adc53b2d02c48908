"""When to stop looping: small rules that look at one loop at a time.

A rule turns what one loop did into a number per position, averages it over the `positions` it looks at
(scope "sequence") or leaves it by token (scope "token"), and stops where that criterion has been below
`threshold` for `patience` loops in a row, between `min_loops` and `max_loops`. A sequence that stops
leaves the batch; a token that stops keeps its state, skips the looped layers and is still attended to.
A criterion that does not exist yet, or has no positions to look at, is NaN and never stops.

To add a rule, subclass `StoppingRule` and give `values`; for one that reads logits subclass `LensRule`
and give `read` and `change`. What a rule does not ask for is not computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count, unknown_name
from loopmdm.model.precision import wide

Lens = Literal["coda", "direct"]


@dataclass(frozen=True)
class LoopView:
    """What there is to see after one loop, of the sequences still running.

    `state`, `previous` and `earlier` are H(i), H(i-1) and H(i-2), each [batch, pos, d_model], where H(-1)
    is the prelude's output and `earlier` is None at loop 0. `masked`, `real` and `held` (stopped tokens)
    are [batch, pos]; `running` [batch] numbers the sequences within the batch that came in.
    `read(lens, rows)` gives logits [row, d_vocab] at the positions `rows` [batch, pos] by unembedding
    the state directly or after the coda. `staying` [batch, pos]: the chance that the model's own gate has let a
    position go on after every loop so far, this one included; None if it has none.
    """

    loop: int
    state: Float[Tensor, "batch pos d_model"]
    previous: Float[Tensor, "batch pos d_model"]
    masked: Bool[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    earlier: Float[Tensor, "batch pos d_model"] | None = None
    held: Bool[Tensor, "batch pos"] | None = None
    running: Int[Tensor, " batch"] | None = None
    read: Callable[[Lens, Tensor], Tensor] | None = None
    staying: Float[Tensor, "batch pos"] | None = None


@dataclass(frozen=True)
class StoppingRule:
    """Base of all rules; by itself it never stops before `max_loops`."""

    threshold: float = field(default=0.0, kw_only=True)
    max_loops: int = field(default=0, kw_only=True)
    min_loops: int = field(default=1, kw_only=True)
    patience: int = field(default=1, kw_only=True)
    positions: Literal["all", "masked"] = field(default="all", kw_only=True)
    scope: Literal["sequence", "token"] = field(default="sequence", kw_only=True)

    def __post_init__(self):
        """Refuse counts and thresholds that make no sense."""
        if type(self.max_loops) is int and self.max_loops == 0:
            raise UsageError(f"{type(self).__name__} needs max_loops=, the most loops it may run")
        for name in ("max_loops", "min_loops", "patience"):
            check_count(name, getattr(self, name))
        if self.min_loops > self.max_loops:
            raise UsageError(f"min_loops {self.min_loops} exceeds max_loops {self.max_loops}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise UsageError(f"threshold must be a number, got {self.threshold!r}")
        if math.isnan(self.threshold) or self.threshold < 0:
            raise UsageError(f"threshold must be at least 0, got {self.threshold!r}")
        for name, words in (("positions", ("all", "masked")), ("scope", ("sequence", "token"))):
            if getattr(self, name) not in words:
                raise UsageError(f'{name} must be "{words[0]}" or "{words[1]}", got {getattr(self, name)!r}')

    @property
    def reads(self) -> Lens | None:
        """The lens that the rule reads its group through at every loop, whose FLOPs are counted."""
        return None

    def group(self, masked: Tensor, real: Tensor) -> Bool[Tensor, "batch pos"]:
        """The positions the rule looks at."""
        return masked & real if self.positions == "masked" else real

    def values(self, view: LoopView) -> Float[Tensor, "batch pos"] | None:  # noqa: ARG002
        """The rule's raw number per position, NaN where it does not exist; None: it looks at nothing."""
        return None

    def criterion(self, view: LoopView) -> Tensor | None:
        """What is compared with `threshold`: [batch], or [batch, pos] with scope "token".

        None if the rule looks at nothing, or needs the reading of the loop before (`LensRule`).
        """
        values = self.values(view)
        return None if values is None else self.reduce(values, self.group(view.masked, view.real))

    def reduce(self, values: Tensor, group: Tensor) -> Tensor:
        """Values [batch, pos] to one number a sequence, or NaN outside the group with scope "token"."""
        if self.scope == "token":
            return values.masked_fill(~group, float("nan"))
        return values.masked_fill(~group, 0.0).sum(-1) / group.sum(-1)

    def calm(self, criterion: Tensor) -> Tensor:
        """Where the criterion is small enough; NaN never is."""
        return criterion < self.threshold

    def replay(self, criterion: Float[Tensor, "loop batch"]) -> Int[Tensor, " batch"]:
        """Loops that sequences with this full record of the criterion would have run.

        The record comes from `run` with threshold 0. It is exact for scope "sequence" within one forward;
        token scope and sampling change the trajectory and cannot be replayed.
        """
        if self.scope == "token":
            raise UsageError('scope "token" changes the trajectory; run it online')
        if len(criterion) < self.max_loops:
            raise UsageError(f"the record has {len(criterion)} loops, the rule may run {self.max_loops}")
        loops = torch.full((criterion.shape[1],), self.max_loops, device=criterion.device)
        streak, running = torch.zeros_like(loops), torch.ones_like(loops, dtype=torch.bool)
        for loop in range(self.max_loops):
            stops, streak = self.stops(loop, criterion[loop], streak)
            loops[running & stops] = loop + 1
            running &= ~stops
        return loops

    def stops(self, loop: int, criterion: Tensor, streak: Tensor) -> tuple[Tensor, Tensor]:
        """Which stop after `loop` (0-based), and for how many loops each has been calm."""
        streak = (streak + 1) * self.calm(criterion)
        return (streak >= self.patience) & (loop + 1 >= self.min_loops), streak


@dataclass(frozen=True)
class FixedLoops(StoppingRule):
    """Run exactly `max_loops` loops."""


@dataclass(frozen=True)
class StateDelta(StoppingRule):
    """Relative change of the state, ||H(i) - H(i-1)|| / ||H(i)||, from loop 1 on.

    The paper stops on hidden-state change; its threshold and scope are unknown, these are ours
    (0.03 is what Geiping et al. 2025, arXiv 2502.05171, use for a recurrent language model).
    """

    threshold: float = 0.03

    def values(self, view: LoopView) -> Tensor:
        """Per position, in float32."""
        return relative_change(view.state, view.previous) if view.loop > 0 else unknown(view)


@dataclass(frozen=True)
class SecondDifference(StoppingRule):
    """||(H(i) - H(i-1)) - (H(i-1) - H(i-2))|| / ||H(i)||, from loop 2 on (after arXiv 2509.23314)."""

    threshold: float = 0.03

    def values(self, view: LoopView) -> Tensor:
        """Per position, in float32."""
        if view.loop < 2 or view.earlier is None:
            return unknown(view)
        state, previous, earlier = wide(view.state), wide(view.previous), wide(view.earlier)
        return (state - 2 * previous + earlier).norm(dim=-1) / state.norm(dim=-1)


@dataclass(frozen=True)
class ExitGate(StoppingRule):
    """The model's own gate: how likely it is that it would still go on, prod over loops so far of (1 - p).

    p is the gate's chance to stop after a loop (Ouro's, arXiv 2510.25741): stopping below 1 - q is its exit at
    quantile q of the exit distribution. What the gate costs is not counted: a product with one vector.
    """

    threshold: float = 0.5

    def values(self, view: LoopView) -> Tensor:
        """Per position; UsageError for a model without a gate."""
        if view.staying is None:
            raise UsageError("ExitGate needs a model with an exit gate of its own; this one has none")
        return view.staying


@dataclass(frozen=True)
class LensRule(StoppingRule):
    """Base of rules on what each loop would answer, by default at masked positions, from loop 1 on.

    `lens` "coda" reads through the coda, as the model would answer if it stopped here; "direct" unembeds
    the state itself. The cost of reading is part of the FLOPs.
    """

    positions: Literal["all", "masked"] = field(default="masked", kw_only=True)
    lens: Lens = field(default="coda", kw_only=True)

    def __post_init__(self):
        """Refuse an unknown lens."""
        super().__post_init__()
        if self.lens not in ("coda", "direct"):
            raise UsageError(f'lens must be "coda" or "direct", got {self.lens!r}')

    @property
    def reads(self) -> Lens:
        """Its own lens."""
        return self.lens

    def read(self, logits: Float[Tensor, "row d_vocab"]) -> Tensor:
        """What to remember of a loop's logits, [row, ...]."""
        raise NotImplementedError

    def change(self, now: Tensor, before: Tensor) -> Float[Tensor, " row"]:
        """The rule's number from this loop's reading and the previous one's."""
        raise NotImplementedError


@dataclass(frozen=True)
class KLDelta(LensRule):
    """KL(this loop's answer || the previous one's) in nats (arXiv 2502.05171 stops below 5e-4)."""

    threshold: float = 5e-4

    def read(self, logits: Tensor) -> Tensor:
        """Log-probabilities [row, d_vocab]."""
        return wide(logits).log_softmax(-1)

    def change(self, now: Tensor, before: Tensor) -> Tensor:
        """In nats; [MASK] has probability 0 in both."""
        return (now.exp() * (now - before).nan_to_num(0.0)).sum(-1).clamp(min=0.0)


@dataclass(frozen=True)
class EntropyDelta(LensRule):
    """Absolute change of the answer's entropy in nats (arXiv 2502.05171 stops below 1e-3)."""

    threshold: float = 1e-3

    def read(self, logits: Tensor) -> Tensor:
        """Entropies [row]."""
        return entropy(logits)

    def change(self, now: Tensor, before: Tensor) -> Tensor:
        """In nats."""
        return (now - before).abs()


@dataclass(frozen=True)
class ArgmaxStable(LensRule):
    """Share of positions whose best token changed: by default none of them for 5 loops (arXiv 2502.05171)."""

    threshold: float = 1e-6
    patience: int = field(default=5, kw_only=True)

    def read(self, logits: Tensor) -> Tensor:
        """Best tokens [row]."""
        return logits.argmax(-1)

    def change(self, now: Tensor, before: Tensor) -> Tensor:
        """1 where it changed, else 0."""
        return (now != before).float()


@dataclass(frozen=True)
class NoiseSchedule(StoppingRule):
    """Loops as a function of the mask ratio, known before the first loop.

    `loops` are the counts for equal bins of the share of masked among real tokens (prompts and clues
    count as clean: it is the noise the model sees): with n of them, `loops[k]` serves ratios in
    (k/n, (k+1)/n]. `max_loops` defaults to the largest. The criterion is the number of planned loops
    that are left.
    """

    loops: tuple[int, ...] = ()

    def __post_init__(self):
        """Check the counts; sequence scope only."""
        if isinstance(self.loops, str) or not isinstance(self.loops, Sequence) or not self.loops:
            raise UsageError("NoiseSchedule needs loop counts for equal bins of the mask ratio, such as (2, 4, 6)")
        object.__setattr__(self, "loops", tuple(check_count("loops", count) for count in self.loops))
        if self.max_loops == 0:
            object.__setattr__(self, "max_loops", max(self.loops))
        super().__post_init__()
        if self.scope == "token" or self.patience > 1:
            raise UsageError('NoiseSchedule plans whole sequences; scope "token" and patience do not apply')

    def criterion(self, view: LoopView) -> Tensor:
        """Planned loops left, [batch]."""
        share = (view.masked & view.real).sum(-1).double() / view.real.sum(-1)
        index = (share * len(self.loops)).ceil().long().sub(1).clamp(min=0)
        planned = torch.tensor(self.loops, device=share.device)[index]
        return (planned - (view.loop + 1)).float()

    def calm(self, criterion: Tensor) -> Tensor:
        """Where no planned loop is left."""
        return criterion <= 0


RULES: dict[str, type[StoppingRule]] = {
    "state-delta": StateDelta,
    "second-difference": SecondDifference,
    "kl-delta": KLDelta,
    "entropy-delta": EntropyDelta,
    "argmax-stable": ArgmaxStable,
    "exit-gate": ExitGate,
}


def parse_rule(text: str, max_loops: int) -> StoppingRule:
    """The rule written as NAME or NAME:THRESHOLD, such as state-delta:0.03."""
    name, _, number = text.partition(":")
    if name not in RULES:
        raise unknown_name("stopping rule", name, RULES)
    if not number:
        return RULES[name](max_loops=max_loops)
    try:
        threshold = float(number)
    except ValueError:
        raise UsageError(f"the threshold in {text!r} is no number; write {name}:0.03") from None
    return RULES[name](max_loops=max_loops, threshold=threshold)


def relative_change(state: Tensor, previous: Tensor) -> Float[Tensor, "batch pos"]:
    """||state - previous|| / ||state|| per position, in float32."""
    state, previous = wide(state), wide(previous)
    return (state - previous).norm(dim=-1) / state.norm(dim=-1)


def entropy(logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """Entropy in nats of softmax(logits), in float32; -inf logits count nothing."""
    log_probs = wide(logits).log_softmax(-1)
    return -(log_probs.exp() * log_probs.clamp(min=-1e9)).sum(-1)


def unknown(view: LoopView) -> Float[Tensor, "batch pos"]:
    """NaN per position: the criterion does not exist yet."""
    return torch.full(view.state.shape[:2], float("nan"), device=view.state.device)


def oracle_loops(losses: Float[Tensor, "loop batch"], flops: Float[Tensor, " loop"], price: float) -> Tensor:
    """Loops [batch] that minimise true loss + price * FLOPs; for analysis, as it looks at the answer.

    `losses` are true-token cross-entropies read after each loop, `flops` the cost of stopping there.
    """
    return (losses + price * flops[:, None]).argmin(0) + 1


def as_rule(n_loops: int | None, stop: Any, default: int) -> StoppingRule:
    """The one rule meant by `n_loops=` or `stop=`; UsageError if both are given."""
    if stop is None:
        return FixedLoops(max_loops=check_count("n_loops", default if n_loops is None else n_loops))
    if n_loops is not None:
        raise UsageError("give n_loops= or stop=, not both; a rule carries its own max_loops")
    if not isinstance(stop, StoppingRule):
        raise UsageError(f"stop must be a stopping rule such as StateDelta(0.03, max_loops=12), got {stop!r}")
    return stop
