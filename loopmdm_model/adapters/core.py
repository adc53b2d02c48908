"""ForeignCore: a model of somebody else's, cut into prelude, loop and coda without touching its code.

    enter   the native forward runs with every block's `forward` sent to a recorder that notes how the block is
            called and hands its input on; the last one stops the forward. Embeddings, position tables and masks
            are native by construction.
    step    we call the native blocks with the noted arguments, layer by layer, loop by loop.
    leave   the native final norm and head.

Attention is heard through torch's fused function (`attention.py`), everything else by detours over a block's own
submodules (`detours.py`), both only where somebody listens. What stands between a family's loops (an injection, a
norm, a random first state) is its `Cycle`.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loopmdm.model.adapters.detours import Detour
from loopmdm.model.adapters.families import Family
from loopmdm.model.adapters.layout import ForeignLayout
from loopmdm.model.adapters.listening import listening, out_weight
from loopmdm.model.adapters.loading import check_uncompiled, is_compiled
from loopmdm.model.adapters.norms import read_readout
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError
from loopmdm.model.protocol import Core, NormWeights, check_attention_mask, check_tokens
from loopmdm.model.sites import Site
from loopmdm.model.taps import NO_TAP, Tap, TapSource, no_taps

STREAM_ARGUMENTS = ("hidden_states", "hidden_state", "x")
"""Keywords under which blocks take the stream when they do not take it first."""


@dataclass(frozen=True)
class BlockCall:
    """How the native forward calls a block, the stream aside."""

    args: tuple
    kwargs: dict[str, Any]
    keyword: str | None

    @classmethod
    def noted(cls, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, "BlockCall"]:
        """The stream, and the rest of a call."""
        for keyword in STREAM_ARGUMENTS:
            if keyword in kwargs:
                rest = {name: value for name, value in kwargs.items() if name != keyword}
                return kwargs[keyword], cls(args, rest, keyword)
        if not args:
            raise UsageError(f"a block is called with {', '.join(kwargs)}; none of them is {STREAM_ARGUMENTS}")
        return args[0], cls(args[1:], kwargs, None)

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """The block on another stream; of a tuple the stream is first."""
        if self.keyword is None:
            out = block(x, *self.args, **self.kwargs)
        else:
            out = block(*self.args, **{self.keyword: x}, **self.kwargs)
        return out[0] if isinstance(out, tuple | list) else out


@dataclass(slots=True, kw_only=True)
class ForeignContext(Context):
    """A context with the native call of every block and the first block's input.

    `extra` holds what the loops of a family share beside the state (an injection, a second state), each
    [batch, ...].
    """

    core: "ForeignCore"
    calls: dict[int, BlockCall]
    first: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, keep: Tensor) -> "ForeignContext":
        """Enter again with the sequences `keep`: what native arguments hold is not ours to slice."""
        held = None if self.held is None else self.held[keep]
        extra = {name: value[keep] for name, value in self.extra.items()}
        tokens, keys = self.tokens[keep], None if self.keys is None else self.keys[keep]
        first, calls = self.core.record(tokens, keys) if len(tokens) else (self.first[keep], {})
        return replace(self, tokens=tokens, keys=keys, held=held, extra=extra, first=first, calls=calls)


class _Entered(BaseException):
    """The recorders have seen all they need. No Exception: a model may catch those."""


class ForeignCore(Core):
    """`native` as a core; its weights are shared, never copied or changed.

    `seed` is that of the random first state, in families that draw one.
    """

    cfg: ForeignLayout

    def __init__(self, native: nn.Module, family: Family, cfg: ForeignLayout):
        super().__init__()
        self.native, self.family, self.cfg = native, family, cfg
        self.blocks: list[nn.Module] = family.find_blocks(native)
        self._same = [self.blocks.index(block) for block in self.blocks]  # one block may be several layers
        self._parts = [{"": native}, *(module._modules for module in native.modules() if module._modules)]
        self.cycle, self.seed = family.cycle(), 0
        self.training = native.training
        self._kinds: dict[int, int] = {}  # by layer, how long a tuple its block returns; 0 for a tensor

    # --- enter ---

    def context(self, tokens: Tensor, attention_mask: Tensor | None = None) -> ForeignContext:
        """Run the native forward up to its last block."""
        check_tokens(self.cfg, tokens)
        self._check_uncompiled()
        keys = check_attention_mask(attention_mask, tokens)
        first, calls = self.record(tokens, keys)
        return ForeignContext(tokens, self.cfg.mask_token_id, keys, core=self, calls=calls, first=first)

    def _check_uncompiled(self) -> None:
        """As `check_uncompiled`, for what was compiled since; a walk by names would cost a small model dear."""
        for parts in self._parts:
            for part in parts.values():
                if part is not None and is_compiled(part):
                    check_uncompiled(self.native)

    def record(self, tokens: Tensor, keys: Tensor | None) -> tuple[Tensor, dict[int, BlockCall]]:
        """What the first block sees, and how every block is called; nothing runs after the last block."""
        first: list[Tensor] = []
        calls: dict[int, BlockCall] = {}

        def recorder(layer: int) -> Callable:
            def route(native: Callable, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
                x, call = BlockCall.noted(args, kwargs)
                first.append(x)
                calls[layer] = call
                if layer == self._same[-1]:
                    raise _Entered
                return (x, *[None] * (kinds[layer] - 1)) if kinds[layer] else x

            return route

        kinds = self._kinds_of(tokens, keys)
        routes = {self.blocks[layer]: recorder(layer) for layer in set(self._same)}
        try:
            with self.cycle.unmoved(), Detour(routes).open():
                self._call_native(tokens, keys, 1)
        except _Entered:
            return first[0], calls
        raise UsageError(
            f"the forward of {type(self.native).__name__} never reached its last block, "
            f"{self.family.blocks[-1]}; give blocks= that it runs"
        )

    def _call_native(self, tokens: Tensor, keys: Tensor | None, n_loops: int) -> Any:
        """The native forward, as its family is called."""
        arguments = self.family.arguments(tokens, keys) | self.cycle.steps(n_loops)
        return self.native(tokens, **arguments)

    def native_logits(self, tokens: Tensor, keys: Tensor | None = None, n_loops: int | None = None) -> Tensor:
        """What the native forward gives after its own number of loops, or `n_loops`, by its own code alone."""
        with self.cycle.drawn(self.seed, 0):
            out = self._call_native(tokens, keys, n_loops or self.cfg.native_loops)
        if isinstance(out, Mapping):
            return out["logits"]
        return out[0] if isinstance(out, tuple) else getattr(out, "logits", out)

    def _kinds_of(self, tokens: Tensor, keys: Tensor | None) -> dict[int, int]:
        if not self._kinds:
            self._kinds = self._seen_kinds(tokens, keys)
        return self._kinds

    def _seen_kinds(self, tokens: Tensor, keys: Tensor | None) -> dict[int, int]:
        """Look on while the native forward runs once."""
        kinds: dict[int, int] = {}

        def onlooker(layer: int) -> Callable:
            def route(native: Callable, *args: Any, **kwargs: Any) -> Any:
                out = native(*args, **kwargs)
                kinds[layer] = len(out) if isinstance(out, tuple | list) else 0
                return out

            return route

        routes = {self.blocks[layer]: onlooker(layer) for layer in set(self._same)}
        with torch.no_grad(), self.cycle.unmoved(), Detour(routes).open():
            self._call_native(tokens, keys, 1)
        missing = [layer for layer in self._same if layer not in kinds]
        if missing:
            raise UsageError(
                f"the forward of {type(self.native).__name__} never called layer {missing[0]} of "
                f"{', '.join(self.family.blocks)}; give blocks= that it runs"
            )
        return kinds

    def enter(self, tokens: Tensor, context: ForeignContext) -> Tensor:  # noqa: ARG002  # pyright: ignore
        """What the first block sees."""
        return context.first

    # --- step ---

    def prelude(self, tokens: Tensor, context: Context, taps: TapSource = no_taps) -> Tensor:
        """Embed and run the prelude layers; the first state is what the family makes of that."""
        return self.cycle.start(self, super().prelude(tokens, context, taps), context)

    def layers(
        self,
        segment: str,
        x: Tensor,
        context: Context,
        taps: TapSource,
        prefix: str = "",
        among: range | None = None,
    ) -> Tensor:
        """The layers of a segment, with what the family does before and after."""
        if segment == "coda":
            return super().layers(segment, self.cycle.leave(self, x), context, taps, prefix, among)
        if segment == "prelude":
            return super().layers(segment, x, context, taps, prefix, among)
        loop = Site.parse(f"{prefix}hook_in").loop
        assert loop is not None, prefix
        parts = self.cycle.parts(self)
        for number, part in enumerate(parts, loop * len(parts)):
            inside = super().layers(
                segment, self.cycle.before(self, x, context, number), context, taps, prefix, part
            )
            out = self.cycle.after(self, x, inside, context, number)
            x = out if context.held is None else torch.where(context.held[..., None], x, out)
        return x

    def layer(
        self, layer: int, x: Tensor, context: ForeignContext, tap: Tap = NO_TAP, held: Tensor | None = None
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One application of a native block; `held` positions are computed, and keep x."""
        x = tap("hook_resid_pre", x)
        with ExitStack() as stack:
            if tap is not NO_TAP:
                stack.enter_context(listening(self.family, self.cfg, self.blocks[layer], tap, held))
            out = context.calls[self._same[layer]](self.blocks[layer], x)
        return tap("hook_resid_post", out if held is None else torch.where(held[..., None], x, out))

    # --- leave ---

    def unembedding(self, x: Tensor, taps: TapSource = no_taps, rows: Tensor | None = None) -> Tensor:
        """Final norm and head of states [..., d_model], or of `rows` of them; [MASK] gets -inf.

        A shifted model's logits move to the token that they predict: those at a position come from the state
        before it.
        """
        if self.facts.shifted:
            if x.ndim != 3:
                raise UsageError("a shifted model reads the state before each row: give [batch, pos, d_model]")
            x = torch.cat([x[:, :1], x[:, :-1]], dim=1)
        x = x if rows is None else x[rows]
        n_rows = x.numel() // x.shape[-1]
        logits = self.family.unembed(self.native, x if x.ndim == 3 else x.reshape(1, n_rows, x.shape[-1]))
        logits = logits.reshape(*x.shape[:-1], logits.shape[-1])
        if self.cfg.mask_token_id is not None:
            logits = logits.clone()  # a head may need what it gave for its backward
            logits[..., self.cfg.mask_token_id] = float("-inf")
        return taps("")("hook_logits", logits)

    # --- what measures ask of the weights ---

    @property
    def mask_vector(self) -> Float[Tensor, " d_model"]:
        """The embedding of [MASK] as the first block's stream knows it, positions and norms aside."""
        self.facts.need("masks", by="mask_vector")
        return self.family.embedded(self.native, torch.tensor(self.cfg.mask_token_id, device=self.device))

    def output_weight(self, layer: int) -> Float[Tensor, "d_model width"]:
        """The weight that takes all heads' z, side by side, to the stream."""
        return out_weight(self.family.part(self.blocks[layer], "attn_out"))

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """The bias that comes with `output_weight`; zero where there is none."""
        bias = getattr(self.family.part(self.blocks[layer], "attn_out"), "bias", None)
        return self.output_weight(layer).new_zeros(self.cfg.d_model) if bias is None else bias

    def readout_weights(self) -> tuple[NormWeights, nn.Linear]:
        """The final norm and the linear unembedding; UsageError where something else leads to logits."""
        self.facts.need("unshifted", by="reading states by W_U")
        return read_readout(self.native, self.family.head)

    def looping(self, first: int, n_layers: int, max_loops: int = 1) -> "ForeignCore":
        """The same weights with other layers looped; shared, not copied."""
        fields = self.cfg.segmented(first, n_layers, max_loops)
        own = (self.cfg.n_prelude_layers, self.cfg.n_loop_layers)
        if self.cycle.fixed and (first, n_layers) != own:
            raise UsageError(
                f"{type(self.native).__name__} does more between its loops than repeat layers; only its own "
                f"layers {own[0]}..{sum(own) - 1} can loop"
            )
        native_loops = self.cfg.native_loops if (first, n_layers) == own else 1
        other = ForeignCore(self.native, self.family, replace(self.cfg, **fields, native_loops=native_loops))
        other.seed = self.seed
        return other

    def exit_gate(self, state: Tensor) -> Tensor | None:
        """The model's own chance to stop after this state, [batch, pos]; None: it has no gate."""
        return self.cycle.exit_gate(self, state)
