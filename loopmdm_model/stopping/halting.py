"""Looping under a stopping rule: who still runs, who has stopped, and what it cost.

Sequences that stop leave the batch. With scope "token" a stopped token is held: it skips the looped
layers with its state unchanged, and the others go on attending to it; its sequence leaves when every
token that the rule looks at has stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.context import Context
from loopmdm.model.errors import check_word
from loopmdm.model.layout import Layout
from loopmdm.model.precision import check_state, wide
from loopmdm.model.stopping.rules import FixedLoops, Lens, LensRule, LoopView, StoppingRule
from loopmdm.model.taps import TapSource, no_taps

OnLoop = Callable[[LoopView], None]


@runtime_checkable
class Looping(Protocol):
    """What looping needs of a model."""

    @property
    def cfg(self) -> Layout:
        """Where its layers stand."""
        ...

    def loop(self, x: Tensor, context: Context, loop: int, taps: TapSource = no_taps) -> Tensor:
        """One loop."""
        ...

    def coda(self, state: Tensor, context: Context) -> Tensor:
        """The layers after the loop."""
        ...

    def exit_gate(self, state: Tensor) -> Tensor | None:
        """Its own chance to stop here, if it has a gate."""
        ...

    def unembedding(self, x: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Logits of states, or of `rows` of them."""
        ...


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
    model: Looping,
    state: Tensor,
    context: Context,
    rule: StoppingRule,
    taps: TapSource = no_taps,
    on_loop: OnLoop | None = None,
) -> Iteration:
    """Run the looped layers on the prelude's output `state` until `rule` stops each sequence."""
    run = _Run(model, state, context, rule)
    for loop in range(rule.max_loops):
        value = run.step(loop, taps, on_loop)
        if value is None:
            continue
        stops = run.record(loop, value)
        if loop + 1 < rule.max_loops and stops.any() and not run.retire(loop, stops):
            break
    return run.result()


class _Run:
    """The sequences that still run, what their rule remembers, and the results of all."""

    def __init__(self, model: Looping, state: Tensor, context: Context, rule: StoppingRule):
        self.model, self.context, self.rule = model, context, rule
        batch, self.length = context.tokens.shape
        device, self.by_token = state.device, rule.scope == "token"
        shape = (batch, self.length) if self.by_token else (batch,)
        self.group = rule.group(context.masked, context.real)
        self.running, self.x = torch.arange(batch, device=device), state
        self.previous: Tensor | None = None
        self.before: Tensor | None = None
        self.staying: Tensor | None = None
        self.streak = torch.zeros(shape, dtype=torch.long, device=device)
        through_coda = isinstance(rule, LensRule) and rule.lens == "coda"
        self.final, self.after_coda = state, state if through_coda else None
        self.loops_used = torch.full((batch,), rule.max_loops, device=device)
        self.token_loops = torch.zeros(shape, dtype=torch.long, device=device) if self.by_token else None
        self.criterion = wide(state[:0]).new_full((rule.max_loops, *shape), float("nan"))
        self.cost = torch.zeros(batch, dtype=torch.float64, device=device)

    def step(self, loop: int, taps: TapSource, on_loop: OnLoop | None) -> Tensor | None:
        """Run one loop; the rule's criterion for those who ran it, None if it looks at nothing."""
        model, context = self.model, self.context
        free = None if context.held is None else ~context.held
        moving = self.length if free is None else free.sum(-1)
        self.cost[self.running] += model.cfg.n_loop_layers * model.cfg.layer_flops(self.length, moving)
        if self.token_loops is not None:
            self.token_loops[self.running] += 1 if free is None else free.long()
        earlier, self.previous = self.previous, self.x
        self.x = model.loop(self.x, context, loop, taps)
        if on_loop is not None or type(self.rule) is not FixedLoops:
            check_state(self.x, context.real, f"H({loop})")
        reader = _Reader(model, self.x, context)
        gate = model.exit_gate(self.x)
        if gate is not None:
            self.staying = 1 - gate if self.staying is None else self.staying * (1 - gate)
        view = LoopView(
            loop,
            self.x,
            self.previous,
            context.masked,
            context.real,
            earlier,
            context.held,
            self.running,
            reader.read,
            self.staying,
        )
        if on_loop is not None:
            on_loop(_own(view))
        rows = self.group if free is None else self.group & free
        value = self._lens(reader, rows) if isinstance(self.rule, LensRule) else self.rule.criterion(view)
        if self.rule.reads is not None:
            self.cost[self.running] += _reading_flops(model, self.rule.reads, self.length, rows)
        return value.masked_fill(~rows, float("nan")) if value is not None and self.by_token else value

    def _lens(self, reader: "_Reader", rows: Bool[Tensor, "batch pos"]) -> Tensor:
        assert isinstance(self.rule, LensRule)
        reading = self.rule.read(reader.read(self.rule.lens, rows))
        value = self.rule.reduce(spread_change(self.rule, reading, self.before, rows), rows)
        self.before = reading
        if self.after_coda is not None:
            self.after_coda = _put(self.after_coda, self.running, reader.after_coda())
        return value

    def record(self, loop: int, value: Tensor) -> Tensor:
        """Keep the criterion; who stops by it."""
        self.criterion[loop, self.running] = value.to(self.criterion.dtype)
        stops, self.streak = self.rule.stops(loop, value, self.streak)
        return stops

    def retire(self, loop: int, stops: Tensor) -> bool:
        """Hold the tokens, or take out the sequences, that stop after `loop`; whether anyone is left."""
        rows = self.group if self.context.held is None else self.group & ~self.context.held
        gone, kept = stops, (~stops)[:, None].expand_as(rows) if not self.by_token else ~stops
        if self.by_token:
            held = stops if self.context.held is None else self.context.held | stops
            gone = (held | ~self.group).all(-1) & self.group.any(-1)
            self.context, kept = self.context.hold(held), kept & (~gone)[:, None]
        if self.before is not None:
            self.before = self.before[kept[rows]]
        if gone.any():
            self.final = _put(self.final, self.running[gone], self.x[gone])
            self.loops_used[self.running[gone]] = loop + 1
            stay = ~gone
            assert self.previous is not None
            self.running, self.x, self.previous = self.running[stay], self.x[stay], self.previous[stay]
            self.staying = None if self.staying is None else self.staying[stay]
            self.context, self.group, self.streak = self.context.rows(stay), self.group[stay], self.streak[stay]
        return bool(len(self.running))

    def result(self) -> Iteration:
        """The last states of all."""
        if len(self.running):
            self.final = _put(self.final, self.running, self.x)
        return Iteration(self.final, self.after_coda, self.loops_used, self.token_loops, self.criterion, self.cost)


class _Reader:
    """Logits of one loop's state by either lens; the coda runs once at most, and nobody listens to it."""

    def __init__(self, model: Looping, state: Tensor, context: Context):
        self.model, self.state, self.context = model, state, context
        self._coda: Tensor | None = None

    def after_coda(self) -> Tensor:
        if self._coda is None:
            self._coda = self.model.coda(self.state, self.context)
        return self._coda

    def read(self, lens: Lens, rows: Bool[Tensor, "batch pos"]) -> Tensor:
        check_word("lens", lens, get_args(Lens))
        return self.model.unembedding(self.after_coda() if lens == "coda" else self.state, rows=rows)


def _reading_flops(model: Looping, lens: Lens, length: int, rows: Tensor) -> Tensor:
    """FLOPs [batch] of one reading by `lens` of the positions `rows`."""
    cfg = model.cfg
    layers = cfg.n_coda_layers if lens == "coda" else 0
    return layers * cfg.layer_flops(length) + cfg.unembedding_flops(rows.sum(-1))


def spread_change(
    rule: LensRule, reading: Tensor, before: Tensor | None, rows: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """A lens rule's numbers at `rows` from this loop's reading and the one before; NaN elsewhere."""
    return spread(None if before is None else rule.change(reading, before), rows)


def spread(values: Float[Tensor, " row"] | None, rows: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Numbers at `rows` and NaN elsewhere; None: NaN everywhere."""
    if values is None:
        return torch.full(rows.shape, float("nan"), device=rows.device)
    return values.new_full(rows.shape, float("nan")).masked_scatter(rows, values)


def _own(view: LoopView) -> LoopView:
    """The view with states of its own: what is done to them does not reach the run."""
    earlier = None if view.earlier is None else view.earlier.clone()
    return replace(view, state=view.state.clone(), previous=view.previous.clone(), earlier=earlier)


def _put(whole: Tensor, index: Tensor, part: Tensor) -> Tensor:
    return part if len(index) == len(whole) else whole.index_copy(0, index, part)
