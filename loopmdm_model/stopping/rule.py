"""What every stopping rule has: a number per position, averaged or by token, and when it is small enough.

A rule turns what one loop did into a number per position, averages it over the `positions` it looks at
(scope "sequence") or leaves it by token (scope "token"), and stops where that criterion has been below
`threshold` for `patience` loops in a row, between `min_loops` and `max_loops`. A sequence that stops
leaves the batch; a token that stops keeps its state, skips the looped layers and is still attended to.
A criterion that does not exist yet, or has no positions to look at, is NaN and never stops.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count, check_number, check_word

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

    name: ClassVar[str] = ""

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
        check_number("threshold", self.threshold, 0)
        for name, words in (("positions", ("all", "masked")), ("scope", ("sequence", "token"))):
            check_word(name, getattr(self, name), words)

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
        return criterion < float(self.threshold)

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

    name: ClassVar[str] = "fixed"


def unknown(view: LoopView) -> Float[Tensor, "batch pos"]:
    """NaN per position: the criterion does not exist yet."""
    return torch.full(view.state.shape[:2], float("nan"), device=view.state.device)


def as_rule(n_loops: int | None, stop: Any, default: int) -> StoppingRule:
    """The one rule meant by `n_loops=` or `stop=`; UsageError if both are given."""
    if stop is None:
        return FixedLoops(max_loops=check_count("n_loops", default if n_loops is None else n_loops))
    if n_loops is not None:
        raise UsageError("give n_loops= or stop=, not both; a rule carries its own max_loops")
    if not isinstance(stop, StoppingRule):
        raise UsageError(f"stop must be a stopping rule such as StateDelta(0.03, max_loops=12), got {stop!r}")
    return stop
