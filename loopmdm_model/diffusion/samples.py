"""What a sampler gives: finished sequences and how they came about."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SampleResult:
    """Finished sequences and how they came about.

    `tokens` [n, pos]; `start` [n, pos] with [MASK] where something was to be filled; `events` [event, 4]:
    every change of an id as (step, sequence, position, id); `loops_used` and `step_flops` [step, n], 0
    where a sequence needed no forward; `times` [step + 1, n], NaN for orders without a diffusion time.
    """

    tokens: Int[Tensor, "n pos"]
    start: Int[Tensor, "n pos"]
    events: Int[Tensor, "event 4"]
    loops_used: Int[Tensor, "step n"]
    step_flops: Float[Tensor, "step n"]
    times: Float[Tensor, "time n"]

    @property
    def history(self) -> Int[Tensor, "time n pos"]:
        """The ids before the first step and after every step, [step + 1, n, pos]."""
        history = self.start.expand(len(self.loops_used) + 1, -1, -1).clone()
        for step in range(len(self.loops_used)):
            _, row, position, token = self.events[self.events[:, 0] == step].T
            history[step + 1 :, row, position] = token
        return history

    @property
    def forwards(self) -> int:
        """Forwards run, counted by sequence."""
        return int((self.loops_used > 0).sum())

    @property
    def skipped(self) -> int:
        """Forwards that a sampler with one forward a step would have run beside these."""
        return self.loops_used.numel() - self.forwards

    @property
    def flops(self) -> float:
        """All forward FLOPs."""
        return float(self.step_flops.sum())


def join(parts: list[SampleResult], start: Tensor) -> SampleResult:
    """The batches of one run, in their order, as one result; `start` says how wide it is if there is none."""
    if not parts:
        none = start[:0]
        empty = torch.zeros(0, 0, dtype=torch.long)
        return SampleResult(none, none, torch.zeros(0, 4, dtype=torch.long), empty, empty.double(), empty.double())
    offset, events = 0, []
    for part in parts:
        shift = torch.tensor([0, offset, 0, 0], device=part.events.device)
        events.append(part.events + shift)
        offset += len(part.tokens)
    return SampleResult(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.start for part in parts]),
        torch.cat(events),
        *(
            torch.cat([getattr(part, name) for part in parts], dim=1)
            for name in ("loops_used", "step_flops", "times")
        ),
    )
