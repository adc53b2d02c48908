"""Semi-autoregressive sampling: block by block, another order within each."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loopmdm.model.diffusion.order import Order, StepView
from loopmdm.model.diffusion.ranking import Confidence
from loopmdm.model.errors import UsageError, check_count


@dataclass(frozen=True)
class Blocks(Order):
    """Semi-autoregressive: blocks of `size` free positions one after the other, `inner` within a block.

    Blocks go left to right, or with `shuffled` in an order drawn for each sequence. The steps are shared
    equally by the blocks.
    """

    size: int
    inner: Order = Confidence()  # noqa: RUF009 - frozen
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
