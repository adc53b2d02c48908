"""What the model would answer along a sampler's way, loop by loop, without keeping states."""

from collections.abc import Container
from typing import TYPE_CHECKING, get_args

import torch

from loopmdm.model.diffusion.sampling import SampleLoop
from loopmdm.model.errors import UsageError, check_word
from loopmdm.model.information import entropy
from loopmdm.model.precision import wide
from loopmdm.model.stopping.rules import Lens, relative_change

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("sequence", "step", "loop", "position", "masked", "top1", "p_top1", "entropy", "state_change")


class Trajectory:
    """A callback for `sample` that records positions at chosen (step, loop).

    `steps` and `loops` are containers of the numbers wanted (default: all), `lens` reads through the
    "coda" or "direct", `masked_only` leaves filled positions out. What it reads is not counted as FLOPs of
    the run.

        trajectory = Trajectory(steps=range(0, 64, 8))
        sample(model, callback=trajectory)
        trajectory.frame()
    """

    def __init__(
        self,
        steps: Container[int] | None = None,
        loops: Container[int] | None = None,
        lens: Lens = "coda",
        masked_only: bool = True,
    ):
        check_word("lens", lens, get_args(Lens))
        for name, among in (("steps", steps), ("loops", loops)):
            if isinstance(among, str | bytes) or not isinstance(among, Container | None):
                raise UsageError(f"{name} must hold numbers, such as range(0, 64, 8), got {among!r:.60}")
        self.steps, self.loops, self.masked_only = steps, loops, masked_only
        self.lens: Lens = lens
        self._parts: list[dict] = []

    def __call__(self, seen: SampleLoop) -> None:
        """Record one loop of one step, if it is wanted."""
        view = seen.view
        wanted = (self.steps is None or seen.step in self.steps) and (
            self.loops is None or view.loop in self.loops
        )
        rows = view.masked if self.masked_only else view.real
        if not wanted or view.read is None or not bool(rows.any()):
            return
        logits = view.read(self.lens, rows)
        log_probs = wide(logits).log_softmax(-1)
        row, position = rows.nonzero().T
        top = log_probs.argmax(-1)
        values = (
            seen.sequences[row],
            torch.full_like(row, seen.step),
            torch.full_like(row, view.loop),
            position,
            view.masked[rows],
            top,
            log_probs.gather(-1, top[:, None])[:, 0].exp(),
            entropy(log_probs),
            relative_change(view.state, view.previous)[rows],
        )
        self._parts.append({name: value.cpu().numpy() for name, value in zip(COLUMNS, values, strict=True)})

    def frame(self) -> "pd.DataFrame":
        """One row a (sequence, step, loop, position).

        `top1` the best token, `p_top1` its probability, `entropy` in nats, `state_change` relative to the
        state, from the prelude's output at loop 0.
        """
        import pandas as pd

        parts = [pd.DataFrame(part) for part in self._parts]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))
