"""Loops planned by the noise level, before the first one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.stopping.rule import LoopView, StoppingRule


@dataclass(frozen=True)
class NoiseSchedule(StoppingRule):
    """Loops as a function of the mask ratio, known before the first loop.

    `loops` are the counts for equal bins of the share of masked among real tokens (prompts and clues
    count as clean: it is the noise the model sees): with n of them, `loops[k]` serves ratios in
    (k/n, (k+1)/n]. `max_loops` defaults to the largest. The criterion is the number of planned loops
    that are left.
    """

    name: ClassVar[str] = "noise-schedule"

    loops: tuple[int, ...] = ()

    def __post_init__(self):
        """Check the counts; sequence scope only."""
        if isinstance(self.loops, str) or not isinstance(self.loops, Sequence) or not self.loops:
            raise UsageError("NoiseSchedule needs loop counts for equal bins of the mask ratio, such as (2, 4, 6)")
        object.__setattr__(self, "loops", tuple(check_count("loops", count) for count in self.loops))
        if type(self.max_loops) is int and self.max_loops == 0:
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
