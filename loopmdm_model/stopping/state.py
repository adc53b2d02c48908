"""Rules on how far a loop moved the state."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from loopmdm.model.precision import wide
from loopmdm.model.stopping.rule import LoopView, StoppingRule, unknown


@dataclass(frozen=True)
class StateDelta(StoppingRule):
    """Relative change of the state, ||H(i) - H(i-1)|| / ||H(i)||, from loop 1 on.

    The paper stops on hidden-state change; its threshold and scope are unknown, these are ours
    (0.03 is what Geiping et al. 2025, arXiv 2502.05171, use for a recurrent language model).
    """

    name: ClassVar[str] = "state-delta"

    threshold: float = 0.03

    def values(self, view: LoopView) -> Tensor:
        """Per position, in float32 at least."""
        return relative_change(view.state, view.previous) if view.loop > 0 else unknown(view)


@dataclass(frozen=True)
class SecondDifference(StoppingRule):
    """||(H(i) - H(i-1)) - (H(i-1) - H(i-2))|| / ||H(i)||, from loop 2 on (after arXiv 2509.23314)."""

    name: ClassVar[str] = "second-difference"

    threshold: float = 0.03

    def values(self, view: LoopView) -> Tensor:
        """Per position, in float32 at least."""
        if view.loop < 2 or view.earlier is None:
            return unknown(view)
        state, previous, earlier = wide(view.state), wide(view.previous), wide(view.earlier)
        return (state - 2 * previous + earlier).norm(dim=-1) / state.norm(dim=-1)


def relative_change(state: Tensor, previous: Tensor) -> Float[Tensor, "batch pos"]:
    """||state - previous|| / ||state|| per position, in float32 at least."""
    state, previous = wide(state), wide(previous)
    return (state - previous).norm(dim=-1) / state.norm(dim=-1)


RULES = (StateDelta, SecondDifference)
