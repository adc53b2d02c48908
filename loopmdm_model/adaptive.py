"""Looping under a stopping rule: who still runs, who has stopped, and what it cost.

Sequences that stop leave the batch. With scope "token" a stopped token is held: it skips the looped
layers with its state unchanged, and the others go on attending to it; its sequence leaves when every
token that the rule looks at has stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm_model import flops
from loopmdm_model.errors import UsageError
from loopmdm_model.stopping import Lens, LensRule, LoopView, StoppingRule
from loopmdm_model.taps import TapSource, no_taps

if TYPE_CHECKING:
    from loopmdm_model.model import Context, LoopMDM

OnLoop = Callable[[LoopView], None]


@dataclass(frozen=True)
class Iteration:
    """The last state of each sequence, and how it came about.

    `after_coda` is set where the rule read every loop through the coda. `criterion` is [loop, batch], or
    [loop, batch, pos] with scope "token"; `token_loops` [batch, pos] only then. `flops` [batch] counts the
    loops and what the rule read, padding of tokens within the batch excepted.
    """

    state: Float[Tensor, "batch pos d_model"]
    after_coda: Float[Tensor, "batch pos d_model"] | None
    loops_used: Int[Tensor, " batch"]
    token_loops: Int[Tensor, "batch pos"] | None
    criterion: Float[Tensor, "loop batch *pos"]
    flops: Float[Tensor, " batch"]


def iterate(
    model: "LoopMDM",
    state: Tensor,
    context: "Context",
    rule: StoppingRule,
    taps: TapSource = no_taps,
    on_loop: OnLoop | None = None,
) -> Iteration:
    """Run the looped layers on the prelude's output `state` until `rule` stops each sequence."""
    cfg, (batch, length) = model.cfg, context.tokens.shape
    device, by_token = state.device, rule.scope == "token"
    lens = rule.lens if isinstance(rule, LensRule) else None
    group = rule.group(context.masked, context.real)
    shape = (batch, length) if by_token else (batch,)
    loops_used = torch.full((batch,), rule.max_loops, device=device)
    token_loops = torch.zeros(batch, length, dtype=torch.long, device=device) if by_token else None
    criterion = torch.full((rule.max_loops, *shape), float("nan"), device=device)
    streak = torch.zeros(shape, dtype=torch.long, device=device)
    cost = torch.zeros(batch, dtype=torch.float64, device=device)
    final, finished_coda = state, state if lens == "coda" else None
    running, x = torch.arange(batch, device=device), state
    previous = earlier = before = None
    for loop in range(rule.max_loops):
        moving = length if context.held is None else (~context.held).sum(-1)
        cost[running] += cfg.n_loop_layers * flops.layer_flops(cfg, length, moving)
        if token_loops is not None:
            token_loops[running] += 1 if context.held is None else (~context.held).long()
        earlier, previous, x = previous, x, model.loop(x, context, loop, taps)
        reader = _Reader(model, x, context)
        view = LoopView(
            loop, x, previous, context.masked, context.real, earlier, context.held, running, reader.read
        )
        if on_loop is not None:
            on_loop(view)
        rows = group if context.held is None else group & ~context.held
        if isinstance(rule, LensRule):
            reading = rule.read(reader.read(rule.lens, rows))
            cost[running] += _reading_flops(model, rule.lens, length, rows)
            value = rule.reduce(spread_change(rule, reading, before, rows), rows)
            before = reading
            if finished_coda is not None:
                finished_coda = _put(finished_coda, running, reader.after_coda())
        else:
            value = rule.criterion(view)
            if value is None:
                continue
            value = value.masked_fill(~rows, float("nan")) if by_token else value
        criterion[loop, running] = value.to(criterion.dtype)
        stops, streak = rule.stops(loop, value, streak)
        if loop + 1 == rule.max_loops or not stops.any():
            continue
        if by_token:
            held = stops if context.held is None else context.held | stops
            gone = (held | ~group).all(-1) & group.any(-1)
            context = context.hold(held)
        else:
            gone = stops
        kept = (~gone)[:, None] & ~stops if by_token else (~gone)[:, None].expand_as(rows)
        if before is not None:
            before = before[kept[rows]]
        if gone.any():
            final = _put(final, running[gone], x[gone])
            loops_used[running[gone]] = loop + 1
            stay = ~gone
            running, x, previous, context = running[stay], x[stay], previous[stay], context.rows(stay)
            group, streak = group[stay], streak[stay]
            if not len(running):
                break
    else:
        final = x if len(running) == batch else _put(final, running, x)
    return Iteration(final, finished_coda, loops_used, token_loops, criterion, cost)


class _Reader:
    """Logits of one loop's state by either lens; the coda runs once at most, and nobody listens to it."""

    def __init__(self, model: "LoopMDM", state: Tensor, context: "Context"):
        self.model, self.state, self.context = model, state, context
        self._coda: Tensor | None = None

    def after_coda(self) -> Tensor:
        if self._coda is None:
            self._coda = self.model.coda(self.state, self.context)
        return self._coda

    def read(self, lens: Lens, rows: Bool[Tensor, "batch pos"]) -> Tensor:
        if lens not in ("coda", "direct"):
            raise UsageError(f'lens must be "coda" or "direct", got {lens!r}')
        return self.model.unembedding((self.after_coda() if lens == "coda" else self.state)[rows])


def _reading_flops(model: "LoopMDM", lens: Lens, length: int, rows: Tensor) -> Tensor:
    """FLOPs [batch] of one reading by `lens` of the positions `rows`."""
    cfg = model.cfg
    layers = cfg.n_coda_layers if lens == "coda" else 0
    return layers * flops.layer_flops(cfg, length) + flops.unembedding_flops(cfg, rows.sum(-1))


def spread_change(
    rule: LensRule, reading: Tensor, before: Tensor | None, rows: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """A lens rule's numbers at `rows` from this loop's reading and the one before; NaN elsewhere."""
    values = torch.full(rows.shape, float("nan"), device=rows.device)
    if before is not None:
        values[rows] = rule.change(reading, before)
    return values


def _put(whole: Tensor, index: Tensor, part: Tensor) -> Tensor:
    return part if len(index) == len(whole) else whole.index_copy(0, index, part)
