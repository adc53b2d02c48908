"""Sampling: which positions (`orders.py`), how many loops (`stopping.py`), which tokens (here).

Reveal-first: a step first chooses the positions it will fill, then unembeds and draws only there. For the
random order this has the law of the joint draw of token-or-[MASK], without its logits at every position
and without the float32 Gumbel noise that truncates small reveal rates. A sequence of which nothing is
revealed at a step needs no forward there: the next one would see the same ids.

All randomness is a function of (seed, sequence, step, position): a sequence has the same tokens alone
(with `first_index`) and in any batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loopmdm.model.diffusion.orders import Order, StepView, as_order
from loopmdm.model.diffusion.prompts import Start, gaps
from loopmdm.model.errors import UsageError, check_count, check_fits, check_model, check_seed
from loopmdm.model.precision import check_logits, wide
from loopmdm.model.protocol import LoopedModel, LoopOutput
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.stopping.halting import OnLoop
from loopmdm.model.stopping.rules import LoopView, StoppingRule, as_rule


@dataclass(frozen=True)
class SampleLoop:
    """What a callback sees after every loop of every step.

    `sequences` [batch] numbers (from `first_index`) the sequences still running, `tokens` [batch, pos] are
    their ids before the step, `view` is the loop as a stopping rule sees it.
    """

    step: int
    sequences: Int[Tensor, " batch"]
    tokens: Int[Tensor, "batch pos"]
    view: LoopView


Callback = Callable[[SampleLoop], None]


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


@torch.no_grad()
def sample(
    model: LoopedModel,
    n: int | None = None,
    length: int | None = None,
    steps: int = 64,
    n_loops: int | None = None,
    stop: StoppingRule | None = None,
    order: str | Sequence[int] | Order = "random",
    prompt: Any = None,
    clues: Any = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    first_index: int = 0,
    callback: Callback | Sequence[Callback] | None = None,
    batch_size: int = 32,
    progress: bool = False,
    partial: bool = False,
    *,
    top_k: int | None = None,
    suppress: int | Iterable[int] = (),
    guidance: float = 0.0,
    end: int | Iterable[int] = (),
    infill: str | Sequence[str] | None = None,
) -> SampleResult:
    """Fill `n` sequences of `length` tokens (default n_ctx) in `steps` denoising steps.

    `prompt` is a text (a HookedLoopMDM has the tokenizer), ids, or one of these for each sequence;
    `clues` stay where they are: {position: id}, ids [pos] or [n, pos] with -1 where free, a
    MaskedBatch, whose clean positions are the clues, or a Sudoku board as people write it (`Board.read`) for a
    model of that size. `infill` is a whole text, or several, with [MASK] for each token to fill; in a prompt these
    letters are text. [PAD] in a prompt is no part of it. `n` defaults to what they hold, else 1. `order` is
    a name of `orders.ORDERS`, with its number as in "threshold:0.9" or alone, "blocks:SIZE",
    "blocks:SIZE:NAME", a permutation or an Order.

    `temperature` 0 takes the best token; `top_k` keeps the k most probable tokens, `top_p` of these the smallest
    set with at least that probability; the ids `suppress` are never drawn. `guidance` w > 0 reads
    logits + w (logits - logits with all that is given masked), two forwards a step (classifier-free guidance that
    needs no training for it; arXiv 2410.18514): loops and callbacks are those of the first, FLOPs of both. `end`
    are ids that end a text: where one was filled and nothing before it is masked, it fills what is masked behind.

    Sequences run in batches of `batch_size`. With `partial` an interruption (Ctrl-C) returns the batches
    that are finished; callbacks have then seen part of the next one, too. `callback` sees every (step, loop);
    what it reads costs no counted FLOPs.
    """
    check_model(model, "sample")
    as_rule(n_loops, stop, model.cfg.max_loops)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_count(name, value)
    check_count("first_index", first_index, least=0)
    ends = _listed(end, "end")
    drawing = Drawing(temperature, top_p, top_k, _listed(suppress, "suppress"), guidance, ends)
    drawing.check(model.cfg.d_vocab)
    check_seed(seed)
    callbacks = _callbacks(callback)
    start = Start.of(model, prompt, gaps(model, infill, prompt, clues, length), n, length)
    plan = as_order(order, start.tokens.shape[1])
    if ends and plan.hides:
        raise UsageError(f"end= needs an order that keeps what it filled, got {plan!r}; give another order")
    most = int(start.free.sum(-1).max())
    sampler = _Sampler(
        model, plan, plan.n_steps(steps, most) if most else 0, n_loops, stop, drawing, seed,
        callbacks,
    )  # fmt: skip
    parts: list[SampleResult] = []
    bar = tqdm(total=len(start) * sampler.steps, disable=not progress, unit="step", leave=False)
    try:
        for first in range(0, len(start), batch_size):
            parts.append(sampler.run(start.rows(slice(first, first + batch_size)), first_index + first, bar))
    except KeyboardInterrupt:
        if not partial:
            raise
    finally:
        bar.close()
    return _join(parts, start.tokens)


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn from logits, and where a text ends; see `sample`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    suppress: tuple[int, ...] = ()
    guidance: float = 0.0
    end: tuple[int, ...] = ()

    def __post_init__(self):
        """Refuse what cannot be drawn with."""
        for name in ("temperature", "top_p", "guidance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{name} must be a number, got {value!r}")
            check_fits(name, value)
        if not (self.temperature == 0 or 1e-4 <= self.temperature < float("inf")):
            raise UsageError(
                f"temperature must be 0 (best token) or at least 1e-4 and finite, got {self.temperature!r}"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if not 0 <= self.guidance < float("inf"):
            raise UsageError(f"guidance must be at least 0 and finite, got {self.guidance!r}")
        if self.top_k is not None:
            check_count("top_k", self.top_k)

    def check(self, d_vocab: int) -> None:
        """UsageError for ids that the model does not have, or if none is left to draw."""
        for name in ("suppress", "end"):
            for token in getattr(self, name):
                if token >= d_vocab:
                    raise UsageError(f"{name} has id {token}, which is outside 0..{d_vocab - 1}")
        if len(set(self.suppress)) >= d_vocab - 1:
            raise UsageError("suppress leaves no id to draw; suppress fewer")

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row, and its probability; see `draw_tokens`."""
        return draw_tokens(logits, uniforms, self.temperature, self.top_p, self.top_k)

    def guided(self, logits: Tensor, without: Tensor) -> Tensor:
        """Logits + guidance * (logits - without); what is -inf stays."""
        return torch.where(logits.isinf(), logits, logits + self.guidance * (logits - without))

    def allowed(self, logits: Tensor) -> Tensor:
        """Logits with those of suppressed ids at -inf."""
        if not self.suppress:
            return logits
        return logits.index_fill(-1, torch.tensor(self.suppress, device=logits.device), float("-inf"))

    def ended(self, tokens: Tensor, free: Tensor, mask_id: int) -> Tensor:
        """`tokens` [batch, pos] with what is masked behind a text's end filled with the id that ended it."""
        masked = free & (tokens == mask_id)
        ends = free & torch.isin(tokens, torch.tensor(self.end, device=tokens.device))
        over = (ends & (masked.cumsum(-1) == 0)).cumsum(-1) > 0
        first = tokens.gather(1, ends.long().argmax(-1, keepdim=True))
        return torch.where(masked & over, first, tokens)


@dataclass(frozen=True)
class _Sampler:
    model: LoopedModel
    order: Order
    steps: int
    n_loops: int | None
    stop: StoppingRule | None
    drawing: Drawing
    seed: int
    callbacks: list[Callback]

    def run(self, start: Start, first_index: int, bar: tqdm) -> SampleResult:
        tokens, mask_id = start.tokens.clone(), self.model.cfg.mask_token_id
        (n, width), device = tokens.shape, tokens.device
        time = torch.ones(n, dtype=torch.float64, device=device)
        confidence = torch.ones(tokens.shape, dtype=torch.float64, device=device)
        loops = torch.zeros(self.steps, n, dtype=torch.long, device=device)
        cost = torch.zeros(self.steps, n, dtype=torch.float64, device=device)
        events, times = [torch.zeros(0, 4, dtype=torch.long, device=device)], [time]
        for step in range(self.steps):

            def uniforms(stream: str, step: int = step) -> Tensor:
                at = 0 if stream == "blocks" else step  # the order of blocks is drawn once
                return row_uniforms(self.seed, stream, n, width, first_index, at).to(device)

            at, of = torch.full_like(loops[0], step), torch.full_like(loops[0], self.steps)
            view = StepView(at, of, (tokens == mask_id) & start.free, start.free, time, confidence, uniforms)
            now = _Step(step, first_index, tokens, start, loops[step], cost[step])
            chosen, hidden, drawn, sure = self._reveal(view, now)
            before, time = tokens, self.order.advance(view)
            if hidden is not None:
                tokens = tokens.masked_fill(hidden, mask_id)
            tokens = tokens.masked_scatter(chosen, drawn.to(tokens.dtype))
            if self.drawing.end:
                tokens = self.drawing.ended(tokens, start.free, mask_id)
            confidence = confidence.masked_scatter(chosen, sure)
            row, position = (tokens != before).nonzero().T
            events.append(torch.stack([torch.full_like(row, step), row, position, tokens[row, position]], dim=1))
            times.append(time)
            bar.update(n)
        return SampleResult(tokens, start.tokens, torch.cat(events), loops, cost, torch.stack(times))

    def _reveal(
        self, view: StepView, now: "_Step"
    ) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None, Tensor, Tensor]:
        """Positions to fill, those to hide, what to fill with and its probability; notes loops and FLOPs."""
        order, uniforms = self.order, view.uniforms("tokens")
        rows = order.candidates(view) if order.reads_logits else order.choose(view, None)
        logits = self._logits(rows, now)
        if not order.reads_logits:
            return rows, order.remask(view), *self.drawing(logits, uniforms[rows])
        scores = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
        log_probs = wide(logits).log_softmax(-1)
        if not order.reads_draws:
            scores[rows] = order.scores(log_probs).double()
            chosen = order.choose(view, scores)
            return chosen, order.remask(view, scores), *self.drawing(logits[chosen[rows]], uniforms[chosen])
        drawn, sure = self.drawing(logits, uniforms[rows])
        there = torch.where(view.masked[rows], drawn, now.tokens[rows])
        scores[rows] = order.drawn_scores(log_probs, there).double()
        chosen = order.choose(view, scores)
        return chosen, order.remask(view, scores), drawn[chosen[rows]], sure[chosen[rows]]

    def _logits(self, rows: Bool[Tensor, "batch pos"], now: "_Step") -> Float[Tensor, "row d_vocab"]:
        """Logits at `rows` as tokens are drawn from them; notes loops and FLOPs [batch]."""
        active = rows.any(-1).nonzero()[:, 0]
        if not len(active):
            return torch.zeros(0, self.model.cfg.d_vocab, device=rows.device)

        def on_loop(seen: LoopView) -> None:
            assert seen.running is not None
            index = active[seen.running]
            for callback in self.callbacks:
                callback(SampleLoop(now.step, now.first_index + index, now.tokens[index], seen))

        run = self._run(now.tokens, rows, active, now, on_loop if self.callbacks else None)
        now.loops[active], now.cost[active] = run.loops_used, run.flops
        logits = run.logits
        if self.drawing.guidance:
            blind = now.tokens.masked_fill(now.start.given, self.model.cfg.mask_token_id)
            without = self._run(blind, rows, active, now)
            now.cost[active] += without.flops
            logits = self.drawing.guided(logits, without.logits)
        never = torch.tensor([self.model.cfg.mask_token_id], device=logits.device)
        return self.drawing.allowed(logits.index_fill(-1, never, float("-inf")))  # whatever a hook said of [MASK]

    def _run(
        self, tokens: Tensor, rows: Tensor, active: Tensor, now: "_Step", on_loop: OnLoop | None = None
    ) -> LoopOutput:
        real = now.start.real
        run = self.model.run(
            tokens[active],
            n_loops=self.n_loops,
            stop=self.stop,
            attention_mask=None if real is None else real[active],
            rows=rows[active],
            on_loop=on_loop,
        )
        check_logits(run.logits)
        return run


@dataclass(frozen=True)
class _Step:
    """One denoising step of a batch: ids before it; `loops` and `cost` [batch] take down what it needs."""

    step: int
    first_index: int
    tokens: Tensor
    start: Start
    loops: Tensor
    cost: Tensor


def _listed(ids: Any, name: str) -> tuple[int, ...]:
    listed = ids if isinstance(ids, Iterable) else [ids]
    return tuple(check_count(f"an id of {name}", token, least=0) for token in listed)


def draw_tokens(
    logits: Float[Tensor, "row d_vocab"],
    uniforms: Float[Tensor, " row"],
    temperature: float,
    top_p: float,
    top_k: int | None = None,
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """One token a row by the inverse of its cumulative distribution in float64, and its probability.

    Of the `top_k` most probable tokens (None: of all), `top_p` keeps the first that reach that share.
    """
    logits = logits.double()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1 or (top_k is not None and top_k < logits.shape[-1]):
        probabilities = _most_probable(probabilities, top_p, top_k)
    total = probabilities.cumsum(-1)
    goal = uniforms[:, None] * total[:, -1:]
    tokens = torch.searchsorted(total, goal, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], (probabilities.gather(-1, tokens) / total[:, -1:])[:, 0]


def _most_probable(probabilities: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """`probabilities` [row, d_vocab] with those beyond top k and top p at 0, not summing to 1."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = 0.0
    if top_p < 1:
        goal = top_p if top_k is None else top_p * ordered.sum(-1, keepdim=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= goal, 0.0)
    return torch.zeros_like(ordered).scatter(-1, index, ordered)


def _callbacks(callback: Callback | Sequence[Callback] | None) -> list[Callback]:
    found = [] if callback is None else [callback] if callable(callback) else callback
    if not isinstance(found, Sequence) or not all(map(callable, found)):
        raise UsageError(f"callback must be a function of a SampleLoop, or several, got {callback!r:.60}")
    return list(found)


def _join(parts: list[SampleResult], start: Tensor) -> SampleResult:
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
