"""Sampling: which positions (`orders.py`), how many loops (`stopping/`), which tokens (`drawing.py`).

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

from loopmdm.model.batching import size_of_batches
from loopmdm.model.diffusion.drawing import Drawing, close, draw_tokens, listed
from loopmdm.model.diffusion.orders import Order, StepView, as_order
from loopmdm.model.diffusion.prompts import Start, infilled
from loopmdm.model.diffusion.samples import SampleResult, join
from loopmdm.model.errors import UsageError, check_count, check_model, check_seed
from loopmdm.model.precision import check_logits, wide
from loopmdm.model.protocol import LoopedModel, LoopOutput
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.stopping.halting import OnLoop
from loopmdm.model.stopping.rules import LoopView, StoppingRule, as_rule

__all__ = ["Callback", "Drawing", "SampleLoop", "SampleResult", "draw_tokens", "sample"]


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
    """Fill `n` sequences of `length` tokens (default: as many as fit) in `steps` denoising steps.

    `prompt` is a text (a HookedLoopMDM has the tokenizer), ids, or one of these for each sequence;
    `clues` stay where they are: {position: id}, ids [pos] or [n, pos] with -1 where free, a
    MaskedBatch, whose clean positions are the clues, or a Sudoku board as people write it (`Board.read`) for a
    model of that size. `infill` is a whole text, or several, with [MASK] for each token to fill; in a prompt these
    letters are text. [PAD] in a prompt is no part of it. Where a tokenizer puts tokens around every text, they
    stand around each sequence, and `length` counts what is between; ids as prompt and rows of clues are taken as
    they are. `n` defaults to what they hold, else 1. `order` is a name of `orders.ORDERS`, with its number as in
    "threshold:0.9" or alone, "blocks:SIZE", "blocks:SIZE:NAME", a permutation or an Order.

    `temperature` 0 takes the best token; `top_k` keeps the k most probable tokens, `top_p` of these the smallest
    set with at least that probability. The ids `suppress` are never drawn, nor is what a tokenizer puts around
    texts (`m.special`) unless it ends them. `end` are ids that end a text: where one was filled and nothing before
    it is masked, it fills what is masked behind. `guidance` w > 0 reads, in float32 at least,
    logits + w (logits - logits with all that is given masked), two forwards a step where something is given
    (classifier-free guidance that needs no training for it; arXiv 2410.18514): loops and callbacks are those of
    the first, FLOPs of both. A step in which nothing is masked any more runs no forward, 0 loops; an order that
    hides may still hide again.

    Sequences run in batches of `batch_size`. With `partial` an interruption (Ctrl-C) returns the batches
    that are finished; callbacks have then seen part of the next one, too. `callback` sees every (step, loop);
    what it reads costs no counted FLOPs.

    >>> s = lm.sample(m, n=2, steps=6, n_loops=4, seed=0)
    >>> s.tokens.shape, s.loops_used.shape
    (torch.Size([2, 36]), torch.Size([6, 2]))
    """
    check_model(model, "sample")
    as_rule(n_loops, stop, model.cfg.max_loops)
    check_count("steps", steps)
    size = size_of_batches(batch_size)
    check_count("first_index", first_index, least=0)
    ends = listed(end, "end")
    drawing = Drawing(temperature, top_p, top_k, listed(suppress, "suppress"), guidance, ends)
    check_seed(seed)
    callbacks = _callbacks(callback)
    start = Start.of(model, prompt, infilled(model, infill, prompt, clues, length), n, length)
    plan = as_order(order, start.tokens.shape[1])
    if ends and plan.hides:
        raise UsageError(f"end= needs an order that keeps what it filled, got {plan!r}; give another order")
    most = int(start.free.sum(-1).max())
    steps = plan.n_steps(steps, most) if most else 0
    never = drawing.never(model.cfg.d_vocab, model.cfg.mask_token_id, getattr(model, "special", frozenset()))
    never = torch.tensor(never, device=start.tokens.device)
    sampler = _Sampler(model, plan, steps, n_loops, stop, drawing, seed, callbacks, never)
    parts: list[SampleResult] = []
    bar = tqdm(total=len(start) * sampler.steps, disable=not progress, unit="step", leave=False)
    try:
        for first in range(0, len(start), size):
            parts.append(sampler.run(start.rows(slice(first, first + size)), first_index + first, bar))
    except KeyboardInterrupt:
        if not partial:
            raise
    finally:
        bar.close()
    return join(parts, start.tokens)


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
    never: Int[Tensor, " id"]

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
            masked = (tokens == mask_id) & start.free
            view = StepView(at, of, masked, start.free, time, confidence, uniforms)
            before, time = tokens, self.order.advance(view)
            if self.order.hides or bool(masked.any()):
                now = _Step(step, first_index, tokens, start, loops[step], cost[step])
                tokens, confidence = self._filled(view, now)
            row, position = (tokens != before).nonzero().T
            events.append(torch.stack([torch.full_like(row, step), row, position, tokens[row, position]], dim=1))
            times.append(time)
            bar.update(n)
        return SampleResult(tokens, start.tokens, torch.cat(events), loops, cost, torch.stack(times))

    def _filled(self, view: StepView, now: "_Step") -> tuple[Int[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
        """Ids after the step, and the probability with which each was drawn."""
        chosen, hidden, drawn, sure = self._reveal(view, now)
        mask_id = self.model.cfg.mask_token_id
        tokens = now.tokens if hidden is None else now.tokens.masked_fill(hidden, mask_id)
        tokens = tokens.masked_scatter(chosen, drawn.to(tokens.dtype))
        if self.drawing.end:
            tokens = self.drawing.ended(tokens, now.start.free, mask_id)
        return tokens, view.confidence.masked_scatter(chosen, sure)

    def _reveal(
        self, view: StepView, now: "_Step"
    ) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None, Tensor, Tensor]:
        """Positions to fill, those to hide, what to fill with and its probability; notes loops and FLOPs."""
        order, uniforms = self.order, view.uniforms("tokens")
        if not order.reads_logits:
            chosen, hidden = order.decide(view, None)
            return chosen, hidden, *self.drawing(self._logits(chosen, now), uniforms[chosen])
        rows = order.candidates(view)
        logits = self._logits(rows, now)
        scores = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
        log_probs = wide(logits).log_softmax(-1)
        if not order.reads_draws:
            scores[rows] = order.scores(log_probs).double()
            chosen, hidden = order.decide(view, scores)
            return chosen, hidden, *self.drawing(logits[chosen[rows]], uniforms[chosen])
        drawn, sure = self.drawing(logits, uniforms[rows])
        there = torch.where(view.masked[rows], drawn, now.tokens[rows])
        scores[rows] = order.drawn_scores(log_probs, there).double()
        chosen, hidden = order.decide(view, scores)
        return chosen, hidden, drawn[chosen[rows]], sure[chosen[rows]]

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
        logits = run.logits.clone()  # the model's own may be kept by a hook
        if self.drawing.guidance:
            logits = self._guided(logits, rows, now)
        close(logits, self.never, seen=not self.drawing.guidance)
        return logits

    def _guided(self, logits: Tensor, rows: Tensor, now: "_Step") -> Float[Tensor, "row d_vocab"]:
        """Logits with guidance in the sequences in which something is given; elsewhere there is none."""
        told = rows & now.start.given.any(-1, keepdim=True)
        active = told.any(-1).nonzero()[:, 0]
        if not len(active):
            return logits
        blind = now.tokens.masked_fill(now.start.given, self.model.cfg.mask_token_id)
        without = self._run(blind, told, active, now)
        now.cost[active] += without.flops
        among, logits = told[rows], wide(logits)
        logits[among] = self.drawing.guided(logits[among], without.logits)
        return logits

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


def _callbacks(callback: Callback | Sequence[Callback] | None) -> list[Callback]:
    found = [] if callback is None else [callback] if callable(callback) else callback
    if not isinstance(found, Sequence) or not all(map(callable, found)):
        raise UsageError(f"callback must be a function of a SampleLoop, or several, got {callback!r:.60}")
    return list(found)
