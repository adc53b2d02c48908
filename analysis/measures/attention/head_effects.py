"""What heads do to the answer: does seeing a symbol raise its logit at the query (copying) or lower it (taken)?

Key k holds symbol s: a clue its own, a masked key the one that the coda reads off its state before this loop. What
head h hands on from k at full attention is v_k W_O. Four reads of its effect on logits y at one hidden query q:

    direct     y_u = (v_k W_O) . d y_u / d h(end), the final norm frozen: past everything that follows
    gradient   y_u = (v_k W_O) . d y_u / d (what attention writes at q): through this loop's MLP and all that
               follows, to first order
    now        y_u = answer after this loop less that without what the head writes at q: no linearisation, all keys
               at once; what the head does before later loops repair or repeat it
    removed    the same of the answer after the last loop

    score = sum_k A_qk (y_s - mean of the other symbols' y) / sum_k A_qk,   over the keys of one kind, nats

A model that computes by thresholds is flat around its states: there direct and gradient are 0 where "now" is not.
`erasure` is -<w, x> / <w, w> of what a head writes, w, and the stream that it reads, x: 1 where it takes away
exactly what its place holds along w.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.interventions.places import applications
from loopmdm.model.context import Context
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.sites import at

READS = ("direct", "gradient", "now", "removed")
KEYS = ("clean", "masked")
MOST_SYMBOLS = 32
"""Vocabularies up to this size have the gradient read: one backward pass a symbol."""
Place = tuple[int, int]
"""Loop and looped layer."""


@dataclass(frozen=True)
class Application:
    """What one query a sequence saw: its attention, the keys' values, and the stream there before the layer."""

    pattern: Float[Tensor, "batch head key"]
    value: Float[Tensor, "batch key head d_head"]
    stream: Float[Tensor, "batch d_model"]

    def written(self, weight: Float[Tensor, "d_model head d_head"]) -> Float[Tensor, "batch head d_model"]:
        """What each head writes at the query."""
        return torch.einsum("bhk,bkhe,dhe->bhd", self.pattern, self.value, weight)


class Seen:
    """A batch run once, one hidden query a sequence: states H(-1), .., applications, intact logits there."""

    def __init__(self, m: HookedLoopMDM, b: MaskedBatch, n_loops: int, seed: int, first: int):
        self.m, self.b, self.n_loops = m, b, n_loops
        order = row_uniforms(seed, "positions", *b.masked.shape, first_index=first, step=1).to(b.tokens.device)
        self.query = order.masked_fill(~b.masked, -1).argmax(-1)
        self.rows = torch.arange(len(b), device=b.tokens.device)
        self.asked = torch.zeros_like(b.masked)
        self.asked[self.rows, self.query] = True
        self.places: dict[Place, Application] = {}
        self.states: list[Tensor] = []
        self.context = self._run()
        self.logits = self.read(self.states[-1])

    def _run(self) -> Context:
        m, kept = self.m, {}

        def keep(leaf: str) -> Callable[..., None]:
            def hear(x: Tensor, hook: Any) -> None:
                if leaf == "pattern":
                    x = x[self.rows, :, self.query]
                elif leaf == "resid_pre":
                    x = x[self.rows, self.query]
                kept[hook.loop(), hook.layer(), leaf] = wide(x).clone()

            return hear

        leaves = ("resid_pre", "v", "pattern")
        hooks = [(applications(m.cfg, None, None, leaf), keep(leaf)) for leaf in leaves]
        hooks.append(("loop.0.hook_in", lambda x, hook: self.states.append(x.clone())))  # noqa: ARG005
        context = None
        with m.hooks(hooks):
            for state, context in m.states(self.b.tokens, self.n_loops, self.b.attention_mask):  # noqa: B007
                self.states.append(state)
        assert context is not None
        for loop, layer in dict.fromkeys(key[:2] for key in kept):
            stream, value, pattern = (kept[loop, layer, leaf] for leaf in leaves)
            self.places[loop, layer] = Application(pattern, value, stream)
        return context

    def read(self, state: Tensor) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the queries, through the coda."""
        return wide(self.m.readout(state, self.context, rows=self.asked))

    def weight(self, layer: int) -> Float[Tensor, "d_model head d_head"]:
        """W_O by head."""
        return wide(self.m.model.output_weight(layer)).unflatten(-1, (self.m.cfg.n_heads, self.m.cfg.d_head))

    def symbols(self, loop: int) -> Int[Tensor, "batch key"]:
        """What each key holds, or favours before the loop."""
        hidden = self.m.cfg.hidden(self.b.tokens)
        found = self.b.tokens.clone()
        if bool(hidden.any()):
            found[hidden] = self.m.readout(self.states[loop], self.context, rows=hidden).argmax(-1)
        return found

    def kinds(self) -> Bool[Tensor, "batch kind key"]:
        """Clean and masked keys, the query itself and padding left out."""
        hidden = self.m.cfg.hidden(self.b.tokens)
        others = self.b.real & ~self.asked
        return torch.stack([~hidden & others, hidden & others], 1)


def other_than(values: Float[Tensor, "*row d_vocab"]) -> Float[Tensor, "*row d_vocab"]:
    """Each less the mean of the others, over finite ones (the logit of [MASK] is none)."""
    known = values.isfinite()
    filled = values.masked_fill(~known, 0.0)
    n = known.sum(-1, keepdim=True)
    return (filled - (filled.sum(-1, keepdim=True) - filled) / (n - 1)).masked_fill(~known, 0.0)


def direct(seen: Seen, place: Place, symbols: Int[Tensor, "batch key"]) -> Float[Tensor, "batch head key"]:
    """Effect of each key's value on its own symbol against the others, past everything, final norm frozen."""
    core = seen.m.model
    norm, unembed = core.readout_weights()
    end = wide(core.coda(seen.states[-1], seen.context)[seen.rows, seen.query])
    end = end - end.mean(-1, keepdim=True) if norm.centred else end
    scale = (end.pow(2).mean(-1) + norm.eps).sqrt()
    table = wide(unembed.weight) * wide(norm.weight)
    table = table - table.mean(-1, keepdim=True) if norm.centred else table
    real = torch.ones(len(table), dtype=torch.bool, device=table.device)
    if core.cfg.mask_token_id is not None:
        real[core.cfg.mask_token_id] = False
    mean, n = table[real].mean(0), int(real.sum())
    direction = (table[symbols] - mean) * n / (n - 1) / scale[:, None, None]
    value = seen.places[place].value
    return torch.einsum("bkhe,dhe,bkd->bhk", value, seen.weight(place[1]), direction)


def gradients(seen: Seen) -> dict[Place, Float[Tensor, "batch d_vocab d_model"]]:
    """D logits at the query / d what attention writes there, at every place; [MASK]'s row is 0."""
    m, moved = seen.m, {}

    def add(x: Tensor, hook: Any) -> Tensor:
        moved[hook.loop(), hook.layer()] = nothing = torch.zeros_like(x, requires_grad=True)
        return x + nothing

    with torch.enable_grad(), m.hooks([(applications(m.cfg, None, None, "attn_out"), add)]):
        *_, (state, context) = m.states(seen.b.tokens, seen.n_loops, seen.b.attention_mask)
        logits = m.readout(state, context, rows=seen.asked)
        finite = logits.detach().isfinite().all(0).nonzero()[:, 0].tolist()
        shape = len(seen.b), logits.shape[-1], m.cfg.d_model
        found = {place: torch.zeros(shape, device=state.device) for place in moved}
        for token in finite:
            parts = torch.autograd.grad(logits[:, token].sum(), list(moved.values()), retain_graph=True)
            for place, part in zip(moved, parts, strict=True):
                found[place][:, token] = part[seen.rows, seen.query]
    return found


def by_gradient(
    seen: Seen, place: Place, symbols: Int[Tensor, "batch key"], gradient: Float[Tensor, "batch d_vocab d_model"]
) -> Float[Tensor, "batch head key"]:
    """As `direct`, through what follows to first order."""
    value, weight = seen.places[place].value, seen.weight(place[1])
    logits = torch.einsum("bkhe,dhe,bvd->bhkv", value, weight, gradient)
    mask = seen.m.cfg.mask_token_id
    if mask is not None:
        logits[..., mask] = float("-inf")
    return _picked(other_than(logits), symbols)


def _picked(values: Float[Tensor, "batch head key d_vocab"], symbols: Tensor) -> Float[Tensor, "batch head key"]:
    index = symbols[:, None, :, None].expand(-1, values.shape[1], -1, 1)
    return values.gather(-1, index)[..., 0]


def removed(seen: Seen, place: Place) -> dict[str, Float[Tensor, "batch head d_vocab"]]:
    """Answer less the answer without what one head writes at the query, each head alone; [MASK] keeps -inf.

    "now" after the same loop, "removed" after the last one.
    """
    m, (loop, layer) = seen.m, place
    found: dict[str, list[Tensor]] = {"now": [], "removed": []}
    soon = seen.read(seen.states[loop + 1])
    for head in range(m.cfg.n_heads):

        def silence(z: Tensor, hook: Any, head: int = head) -> Tensor:  # noqa: ARG001
            z = z.clone()
            z[seen.rows, seen.query, head] = 0
            return z

        with m.hooks([(at(loop=loop, layer=layer, leaf="z"), silence)]):
            state = m.loop(seen.states[loop], seen.context, loop)
        found["now"].append(soon - seen.read(state))
        for later in range(loop + 1, seen.n_loops):
            state = m.loop(state, seen.context, later)
        found["removed"].append(seen.logits - seen.read(state))
    never = ~seen.logits.isfinite()[:, None]
    return {name: torch.stack(parts, 1).masked_fill(never, float("-inf")) for name, parts in found.items()}


def effects(seen: Seen) -> Iterator[tuple[Place, dict[tuple[str, str], Float[Tensor, "batch head"]]]]:
    """Scores by place, {(read, kind of key): [batch, head]}, and ("erasure", ""); NaN where no key is seen."""
    small = seen.m.cfg.d_vocab <= MOST_SYMBOLS
    slopes, kinds, before = gradients(seen) if small else {}, seen.kinds(), (-1, seen.b.tokens)
    for place, application in seen.places.items():
        if place[0] != before[0]:
            before = place[0], seen.symbols(place[0])
        symbols, pairs = before[1], {"direct": direct(seen, place, before[1])}
        if small:
            pairs["gradient"] = by_gradient(seen, place, symbols, slopes[place])
        for read, change in removed(seen, place).items():
            index = symbols[:, None].expand(-1, change.shape[1], -1)
            pairs[read] = other_than(change).gather(-1, index)
        found = {}
        for read, values in pairs.items():
            for number, kind in enumerate(KEYS):
                weight = application.pattern * kinds[:, number, None]
                total = weight.sum(-1)
                score = (weight * values).sum(-1) / total
                found[read, kind] = score.masked_fill(total < 1e-6, float("nan"))
        written = application.written(seen.weight(place[1]))
        size = written.pow(2).sum(-1)
        along = torch.einsum("bhd,bd->bh", written, application.stream)
        found["erasure", ""] = (-along / size).masked_fill(size.sqrt() < 1e-4, float("nan"))
        yield place, found
