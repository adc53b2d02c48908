"""What a model offers to everything that reads, measures, samples or intervenes: a `Core`.

    H(-1) = prelude(tokens),   H(i) = loop(H(i-1)) for i = 0..S-1,   logits = unembedding(coda(H(S-1)))

A core says how tokens enter, how one layer is applied and how states become logits; running loops, stopping,
reading out after any loop, likelihood and sampling follow from that. Its `cfg` is a `Layout` (where layers stand,
what they cost), its `facts` what kind of model it is: a measure states what it needs and is refused by the fact
that is missing. `LoopMDM` is one core, other people's models are others; `LoopedModel` is what likelihood,
sampling and measures take: a core, or one with hooks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loopmdm.model import blocks, flops
from loopmdm.model.blocks import RowLogits
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_count, check_data
from loopmdm.model.layout import Facts, Layout
from loopmdm.model.precision import check_state
from loopmdm.model.stopping.halting import OnLoop, iterate
from loopmdm.model.stopping.rules import StoppingRule, as_rule
from loopmdm.model.taps import EXPLICIT_TAP, NO_TAP, Tap, TapSource, no_taps


@dataclass(frozen=True)
class LoopOutput:
    """What one forward with a stopping rule gives.

    `logits` [batch, pos, d_vocab], or [row, d_vocab] where rows were chosen, or what `into` made of these
    [row, ..]; `loops_used` [batch];
    `criterion` [loop, batch], the rule's raw number, NaN where it does not exist or the sequence had
    stopped ([loop, batch, pos] with scope "token", which also gives `token_loops` [batch, pos]);
    `flops` [batch] of the whole forward, what the rule read included.
    """

    logits: Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "row ..."]
    loops_used: Int[Tensor, " batch"]
    criterion: Float[Tensor, "loop batch *pos"]
    flops: Float[Tensor, " batch"]
    token_loops: Int[Tensor, "batch pos"] | None = None


@runtime_checkable
class LoopedModel(Protocol):
    """What likelihood, sampling and measures need of a model: a `Core`, or one with hooks."""

    @property
    def cfg(self) -> Layout:
        """Where its layers stand."""
        ...

    @property
    def facts(self) -> Facts:
        """What kind of model it is."""
        ...

    def run(
        self,
        tokens: Tensor,
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        on_loop: OnLoop | None = None,
        into: Callable[[RowLogits], Tensor] | None = None,
    ) -> LoopOutput:
        """Forward with a fixed number of loops or with a stopping rule."""
        ...

    def states(
        self, tokens: Tensor, n_loops: int, attention_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Context]]:
        """The states of one trajectory."""
        ...

    def readout(self, state: Tensor, context: Context, *, rows: Tensor | None = None) -> Tensor:
        """Logits from a state, at the positions `rows` or at all."""
        ...

    def read(self, state: Tensor, context: Context, *, rows: Tensor) -> RowLogits:
        """The same at `rows`, block by block."""
        ...


@dataclass(frozen=True)
class NormWeights:
    """A norm in numbers: n(x) * weight + bias; n(x) is x, less its mean if `centred`, over its root mean square.

    `weight` and `bias` [d_model]; `eps` is added to the mean square.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


class Core(nn.Module):
    """Base of all models: give `context`, `enter`, `layer`, `unembedding`, and what is marked below."""

    cfg: Layout

    # --- what a family gives ---

    def context(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Context:
        """Check the input and build what all layers share."""
        raise NotImplementedError

    def enter(self, tokens: Tensor, context: Context) -> Tensor:
        """What the first layer sees, [batch, pos, d_model]."""
        raise NotImplementedError

    def layer(
        self, layer: int, x: Tensor, context: Context, tap: Tap = NO_TAP, held: Tensor | None = None
    ) -> Tensor:
        """One application of physical `layer`; positions `held` [batch, pos] keep x."""
        raise NotImplementedError

    def unembedding(self, x: Tensor, taps: TapSource = no_taps, rows: Tensor | None = None) -> Tensor:
        """Final norm and unembedding of states [..., d_model], or of `rows` of them; [MASK] gets -inf."""
        raise NotImplementedError

    @property
    def mask_vector(self) -> Float[Tensor, " d_model"]:
        """The embedding of [MASK]."""
        raise NotImplementedError

    def output_weight(self, layer: int) -> Float[Tensor, "d_model width"]:
        """The weight that takes all heads' z, side by side, to the stream."""
        raise NotImplementedError

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """The bias that comes with `output_weight`."""
        raise NotImplementedError

    def readout_weights(self) -> tuple[Any, nn.Linear]:
        """The final norm's `NormWeights` and the linear unembedding; UsageError where more leads to logits."""
        raise UsageError(
            f"{type(self).__name__} does not say which norm and weight lead from its states to logits"
        )

    def looping(self, first: int, n_layers: int, max_loops: int = 1) -> "Core":
        """The same weights with layers first .. first + n_layers - 1 looped; shared, not copied."""
        raise NotImplementedError

    def exit_gate(self, state: Tensor) -> Tensor | None:  # noqa: ARG002
        """The model's own chance to stop after this state, [batch, pos]; None: it has no gate."""
        return None

    # --- what follows ---

    @property
    def facts(self) -> Facts:
        """What kind of model it is."""
        return self.cfg.facts

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that write states."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def n_parameters(self) -> int:
        """Parameters stored (looped layers counted once)."""
        return sum(parameter.numel() for parameter in self.parameters())

    def layer_flops(self, length: int, moving: Any = None) -> Any:
        """FLOPs of one layer on one sequence, as the layout counts them."""
        return self.cfg.layer_flops(length, moving)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        n_loops: int | None = None,
        attention_mask: Tensor | None = None,
        taps: TapSource = no_taps,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits after `n_loops` loops (default cfg.max_loops); [MASK]'s logit is -inf.

        `attention_mask` [batch, pos] is 1 for real tokens, 0 for padding.
        """
        n_loops = check_count("n_loops", self.cfg.max_loops if n_loops is None else n_loops)
        context = self.context(tokens, attention_mask)
        x = self.prelude(tokens, context, taps)
        for loop in range(n_loops):
            x = self.loop(x, context, loop, taps)
        return self.readout(x, context, taps)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        taps: TapSource = no_taps,
        *,
        rows: Bool[Tensor, "batch pos"] | None = None,
        on_loop: OnLoop | None = None,
        into: Callable[[RowLogits], Tensor] | None = None,
    ) -> LoopOutput:
        """Forward with a fixed number of loops or with a stopping rule.

        With `rows` logits are computed at those positions only and come packed, [row, d_vocab], in
        reading order. `into` makes something of them, block by block, and that stands in the place of `logits`.
        `on_loop` is called with a `LoopView` after every loop.
        """
        rule = as_rule(n_loops, stop, self.cfg.max_loops)
        context = self.context(tokens, attention_mask)
        if on_loop is not None and not callable(on_loop):
            raise UsageError(f"on_loop must be a function of a LoopView, got {on_loop!r:.60}")
        if rows is not None and (
            not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.shape != tokens.shape
        ):
            raise UsageError(f"rows must be boolean with one entry per token, {list(tokens.shape)}")
        if into is not None and rows is None:
            raise UsageError("into makes something of the logits at rows=; give these, too")
        x = self.prelude(tokens, context, taps)
        done = iterate(self, x, context, rule, taps, on_loop)
        after = None if self._heard(taps) else done.after_coda  # the rule may have been there already
        if into is not None and rows is not None:
            logits = into(
                self.read(done.state, context, taps, rows=rows)
                if after is None
                else RowLogits.of(lambda some: self.unembedding(after, rows=some), rows, self.cfg.d_vocab)
            )
        elif after is None:
            logits = self.readout(done.state, context, taps, rows=rows)
        else:
            logits = self.unembedding(after, rows=rows)
        cost = done.flops + self._ends_flops(tokens, rows, coda=done.after_coda is None)
        return LoopOutput(logits, done.loops_used, done.criterion, cost, done.token_loops)

    def _ends_flops(self, tokens: Tensor, rows: Tensor | None, coda: bool) -> Tensor | int:
        drawn = None if rows is None else rows.sum(-1)
        cost = flops.readout_flops(self.cfg, tokens.shape[1], drawn, coda)
        return self.cfg.n_prelude_layers * self.layer_flops(tokens.shape[1]) + cost

    def prelude(self, tokens: Tensor, context: Context, taps: TapSource = no_taps) -> Tensor:
        """Embed and run the prelude layers: H(-1), [batch, pos, d_model]."""
        tap = taps("")
        tap.enter(context)
        return self.layers("prelude", tap("hook_embed", self.enter(tokens, context)), context, taps)

    def loop(self, x: Tensor, context: Context, loop: int, taps: TapSource = no_taps) -> Tensor:
        """Run the looped layers once as iteration `loop`: H(loop) from H(loop - 1)."""
        prefix = f"loop.{loop}."
        tap = taps(prefix)
        tap.enter(context)
        x = self.layers("loop", tap("hook_in", x), context, taps, prefix)
        return tap("hook_out", x)

    def coda(
        self, state: Tensor, context: Context, taps: TapSource = no_taps, *, rows: Tensor | None = None
    ) -> Tensor:
        """Run the coda layers on a loop's output, [batch, pos, d_model].

        With `rows` [batch, pos] the last layer updates those positions only: nobody reads the others.
        """
        layers = self.cfg.layers("coda")
        if rows is None or not layers or self.facts.shifted:  # a shifted model reads the state before each row
            return self.layers("coda", state, context, taps)
        x = self.layers("coda", state, context, taps, among=layers[:-1])
        prefix = f"blocks.{layers[-1]}."
        return self._applied(layers[-1], x, context, taps(prefix), ~rows)

    def layers(
        self,
        segment: str,
        x: Tensor,
        context: Context,
        taps: TapSource,
        prefix: str = "",
        among: range | None = None,
    ) -> Tensor:
        """Apply the layers of a segment, or `among` them, in order; only looped ones hold tokens."""
        held = context.held if segment == "loop" else None
        for layer in self.cfg.layers(segment) if among is None else among:
            x = self._applied(layer, x, context, taps(f"{prefix}blocks.{layer}."), held)
        return x

    def _applied(self, layer: int, x: Tensor, context: Context, tap: Tap, held: Tensor | None) -> Tensor:
        tap.enter(context)
        return self.layer(layer, x, context, tap, held)

    def readout(
        self, state: Tensor, context: Context, taps: TapSource = no_taps, *, rows: Tensor | None = None
    ) -> Tensor:
        """Coda, final norm, unembedding: logits [batch, pos, d_vocab] from a loop's output.

        With `rows` [batch, pos] only those positions are unembedded: [row, d_vocab]. If anybody listens to
        the coda or what follows, all positions are computed, and `rows` chosen at the end.
        """
        if rows is not None and self._heard(taps):
            return self.unembedding(self.coda(state, context, taps), taps)[rows]
        if rows is not None and not bool(rows.any()):
            return self.unembedding(state, taps, rows)  # nobody asks
        return self.unembedding(self.coda(state, context, taps, rows=rows), taps, rows)

    def read(
        self, state: Tensor, context: Context, taps: TapSource = no_taps, *, rows: Bool[Tensor, "batch pos"]
    ) -> RowLogits:
        """As `readout` at `rows`, block by block; at once if anybody listens to what follows the coda."""
        if taps("") not in (NO_TAP, EXPLICIT_TAP) or int(rows.sum()) * self.cfg.d_vocab <= blocks.BLOCK:
            return RowLogits(rows, self.cfg.d_vocab, self.readout(state, context, taps, rows=rows))
        x = self.coda(state, context, taps, rows=None if self._heard(taps) else rows)
        return RowLogits(rows, self.cfg.d_vocab, None, lambda some: self.unembedding(x, rows=some))

    def _heard(self, taps: TapSource) -> bool:
        """Whether anybody listens to the coda or to what follows it."""
        prefixes = ["", *(f"blocks.{layer}." for layer in self.cfg.layers("coda"))]
        return any(taps(prefix) is not NO_TAP for prefix in prefixes)

    def states(
        self, tokens: Tensor, n_loops: int, attention_mask: Tensor | None = None, taps: TapSource = no_taps
    ) -> Iterator[tuple[Tensor, Context]]:
        """Yield H(0), H(1), .. of one trajectory with its context; `readout(H(i), ...)` is S = i + 1.

        NotFiniteError for a state that is not finite.
        """
        context = self.context(tokens, attention_mask)
        x = self.prelude(tokens, context, taps)
        for loop in range(check_count("n_loops", n_loops)):
            x = self.loop(x, context, loop, taps)
            check_state(x, context.real, f"H({loop})")
            yield x, context


def core_of(model: "LoopedModel | Core") -> Core:
    """The core of a model, without hooks."""
    core = model if isinstance(model, Core) else getattr(model, "model", None)
    if not isinstance(core, Core):
        raise UsageError(f"{type(model).__name__} is no Core and holds none as .model; see loopmdm.model.protocol")
    return core


# --- input checks ---


def check_tokens(cfg: Layout, tokens: Tensor) -> None:
    """UsageError unless `tokens` are integer ids [batch, pos] that the model knows, at most n_ctx long."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise UsageError(f"tokens must be an integer tensor (int64 or int32), got {kind}")
    check_data("tokens", tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise UsageError(f"tokens must be a non-empty [batch, pos] tensor, got shape {list(tokens.shape)}")
    if tokens.shape[1] > cfg.n_ctx:
        raise UsageError(f"sequence of {tokens.shape[1]} tokens exceeds n_ctx = {cfg.n_ctx}; shorten it")
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= cfg.d_vocab:
        wrong = low if low < 0 else high
        raise UsageError(f"token id {wrong} is outside 0..{cfg.d_vocab - 1}; use this model's own tokenizer")


def check_attention_mask(attention_mask: Tensor | None, tokens: Tensor) -> Bool[Tensor, "batch pos"] | None:
    """Which tokens are real, None if all are; UsageError for a mask of another shape or kind."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise UsageError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    check_data("entries of attention_mask", attention_mask)
    if attention_mask.shape != tokens.shape:
        raise UsageError(
            f"attention_mask has shape {list(attention_mask.shape)}, tokens {list(tokens.shape)}; "
            "give one entry per token"
        )
    if attention_mask.is_floating_point():
        raise UsageError(f"attention_mask must be bool or integer 0/1, got {attention_mask.dtype}")
    real = attention_mask != 0
    if not bool(real.any(dim=1).all()):
        raise UsageError("attention_mask hides every token of a sequence; keep at least one or drop the row")
    return real
