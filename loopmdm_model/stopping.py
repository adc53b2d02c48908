"""When to stop looping: small rules that look at one loop at a time.

A rule has `max_loops`, `min_loops` and `criterion(view)`, one number per sequence or None when it
needs nothing. Where the criterion falls below `threshold` the sequence stops and leaves the batch.
A criterion that does not exist yet is NaN and never stops. To add a rule, subclass `StoppingRule`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm_model.errors import UsageError, check_count


@dataclass(frozen=True)
class LoopView:
    """What a rule may look at after one loop, for the sequences still running.

    `state` and `previous` are [batch, pos, d_model]: the loop's output H(i) and H(i-1), where
    H(-1) is the prelude's output; `masked` and `real` are [batch, pos].
    """

    loop: int
    state: Float[Tensor, "batch pos d_model"]
    previous: Float[Tensor, "batch pos d_model"]
    masked: Bool[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class StoppingRule:
    """Base of all rules; by itself it never stops before `max_loops`."""

    threshold: float = field(default=0.0, kw_only=True)
    max_loops: int = field(kw_only=True)
    min_loops: int = field(default=1, kw_only=True)

    def __post_init__(self):
        """Refuse counts and thresholds that make no sense."""
        check_count("max_loops", self.max_loops)
        check_count("min_loops", self.min_loops)
        if self.min_loops > self.max_loops:
            raise UsageError(f"min_loops {self.min_loops} exceeds max_loops {self.max_loops}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise UsageError(f"threshold must be a number, got {self.threshold!r}")
        if math.isnan(self.threshold) or self.threshold < 0:
            raise UsageError(f"threshold must be at least 0, got {self.threshold!r}")

    def criterion(self, view: LoopView) -> Float[Tensor, " batch"] | None:  # noqa: ARG002
        """The rule's raw number per running sequence; None: this rule looks at nothing."""
        return None

    def stops(self, loop: int, criterion: Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Which running sequences stop after `loop` (0-based)."""
        if loop + 1 < self.min_loops:
            return torch.zeros_like(criterion, dtype=torch.bool)
        return criterion < self.threshold


@dataclass(frozen=True)
class FixedLoops(StoppingRule):
    """Run exactly `max_loops` loops."""


@dataclass(frozen=True)
class StateDelta(StoppingRule):
    """Stop when the state's relative change ||H(i) - H(i-1)|| / ||H(i)|| is small.

    The change is averaged over `positions` ("all" real ones or "masked" ones) of a sequence. The
    paper stops on hidden-state change; its threshold and scope are unknown, these are ours. At loop
    0 there are not yet two loop outputs: NaN. A sequence without masked positions is NaN under
    "masked" and runs to the end.
    """

    threshold: float = 0.03
    min_loops: int = field(default=2, kw_only=True)
    positions: Literal["all", "masked"] = field(default="all", kw_only=True)

    def __post_init__(self):
        """Clip the default min_loops to max_loops, then check."""
        if isinstance(self.max_loops, int) and self.max_loops == 1 and self.min_loops == 2:
            object.__setattr__(self, "min_loops", 1)
        super().__post_init__()
        if self.positions not in ("all", "masked"):
            raise UsageError(f'positions must be "all" or "masked", got {self.positions!r}')

    def criterion(self, view: LoopView) -> Float[Tensor, " batch"]:
        """Mean relative change per sequence, in float32."""
        if view.loop == 0:
            return view.state.new_full((view.state.shape[0],), float("nan"), dtype=torch.float32)
        change = relative_change(view.state, view.previous)
        group = view.masked & view.real if self.positions == "masked" else view.real
        return (change * group).sum(-1) / group.sum(-1)


def relative_change(state: Tensor, previous: Tensor) -> Float[Tensor, "batch pos"]:
    """||state - previous|| / ||state|| per position, in float32."""
    state, previous = state.float(), previous.float()
    return (state - previous).norm(dim=-1) / state.norm(dim=-1)


def as_rule(n_loops: int | None, stop: StoppingRule | None, default: int) -> StoppingRule:
    """The one rule meant by `n_loops=` or `stop=`; UsageError if both are given."""
    if stop is None:
        return FixedLoops(max_loops=check_count("n_loops", default if n_loops is None else n_loops))
    if n_loops is not None:
        raise UsageError("give n_loops= or stop=, not both; a rule carries its own max_loops")
    if not isinstance(stop, StoppingRule):
        raise UsageError(f"stop must be a stopping rule such as StateDelta(0.03, max_loops=12), got {stop!r}")
    return stop
