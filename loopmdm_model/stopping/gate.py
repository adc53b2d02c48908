"""The rule of a model that says itself when it is done."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loopmdm.model.errors import UsageError
from loopmdm.model.stopping.rule import LoopView, StoppingRule


@dataclass(frozen=True)
class ExitGate(StoppingRule):
    """The model's own gate: how likely it is that it would still go on, prod over loops so far of (1 - p).

    p is the gate's chance to stop after a loop (Ouro's, arXiv 2510.25741): stopping below 1 - q is its exit at
    quantile q of the exit distribution. What the gate costs is not counted: a product with one vector.
    """

    name: ClassVar[str] = "exit-gate"

    threshold: float = 0.5

    def values(self, view: LoopView) -> Tensor:
        """Per position; UsageError for a model without a gate."""
        if view.staying is None:
            raise UsageError("ExitGate needs a model with an exit gate of its own; this one has none")
        return view.staying


RULES = (ExitGate,)
