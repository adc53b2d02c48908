"""LoopMDM: a masked diffusion language model whose middle layers run S times with shared weights.

    H(-1) = prelude(tokens),   H(i) = loop(H(i-1)) for i = 0..S-1,   logits = unembed(ln(coda(H(S-1))))

There is no time input, no input injection, no loop embedding and no loss on inner loops: the
equations of "Looped Diffusion Language Models" (arXiv 2605.26106) show none. It follows that loop
i's states are the same for every S > i, and that the coda read-out after loop i *is* the model at
n_loops = i + 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loopmdm_model import checkpoints, flops
from loopmdm_model.adaptive import OnLoop, iterate
from loopmdm_model.config import SEGMENTS, LoopMDMConfig
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.layers import Block, Norm, rotary_tables
from loopmdm_model.stopping import StoppingRule, as_rule
from loopmdm_model.taps import NO_TAP, TapSource, no_taps


@dataclass(slots=True)
class Context:
    """What layer applications need beside their input; rows can be dropped as sequences stop.

    `allowed` [batch, 1, 1 or query, key] or None per segment; `tokens` and `masked` [batch, pos];
    `keys` [batch, pos] tells real tokens from padding, None: all are real; `held` [batch, pos] which
    tokens skip the looped layers, None: none does.
    """

    rotary: tuple[Tensor, Tensor]
    allowed: dict[str, Tensor | None]
    tokens: Int[Tensor, "batch pos"]
    mask_token_id: int
    keys: Bool[Tensor, "batch pos"] | None
    held: Bool[Tensor, "batch pos"] | None = None

    @property
    def masked(self) -> Bool[Tensor, "batch pos"]:
        """Which positions hold [MASK]."""
        return self.tokens == self.mask_token_id

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Which positions are not padding."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.keys is None else self.keys

    def rows(self, keep: Tensor) -> "Context":
        """The context of the sequences `keep` (index or boolean [batch])."""
        allowed = {name: None if mask is None else mask[keep] for name, mask in self.allowed.items()}
        keys = None if self.keys is None else self.keys[keep]
        held = None if self.held is None else self.held[keep]
        return Context(self.rotary, allowed, self.tokens[keep], self.mask_token_id, keys, held)

    def hold(self, held: Bool[Tensor, "batch pos"]) -> "Context":
        """The context with some tokens held."""
        return Context(self.rotary, self.allowed, self.tokens, self.mask_token_id, self.keys, held)


@dataclass(frozen=True)
class LoopOutput:
    """What one forward with a stopping rule gives.

    `logits` [batch, pos, d_vocab], or [row, d_vocab] where rows were chosen; `loops_used` [batch];
    `criterion` [loop, batch], the rule's raw number, NaN where it does not exist or the sequence had
    stopped ([loop, batch, pos] with scope "token", which also gives `token_loops` [batch, pos]);
    `flops` [batch] of the whole forward, what the rule read included.
    """

    logits: Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "row d_vocab"]
    loops_used: Int[Tensor, " batch"]
    criterion: Float[Tensor, "loop batch *pos"]
    flops: Float[Tensor, " batch"]
    token_loops: Int[Tensor, "batch pos"] | None = None


@runtime_checkable
class LoopedModel(Protocol):
    """What likelihood and sampling need of a model: LoopMDM and HookedLoopMDM both are one."""

    cfg: LoopMDMConfig

    def run(
        self,
        tokens: Tensor,
        n_loops: int | None = None,
        stop: StoppingRule | None = None,
        attention_mask: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        on_loop: OnLoop | None = None,
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


class LoopMDM(nn.Module):
    """The model in plain torch. `taps` arguments let others listen (see `taps.py`)."""

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, cfg: LoopMDMConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = Norm(cfg, "ln_final.")
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=cfg.unembed_bias)
        cos, sin = rotary_tables(cfg)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal weights; what writes to the stream shrinks by sqrt(2 x depth), see `cfg.initial_depth`."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            std = self.cfg.initializer_range
            if name.endswith(("attn.out.weight", "mlp.out.weight")):
                segment = self.cfg.segment(int(name.split(".")[1]))
                std = std / (2 * self.cfg.initial_depth(segment)) ** 0.5
            nn.init.normal_(parameter, std=std)

    # --- the forward pass, read top to bottom ---

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
    ) -> LoopOutput:
        """Forward with a fixed number of loops or with a stopping rule.

        With `rows` logits are computed at those positions only and come packed, [row, d_vocab], in
        reading order. `on_loop` is called with a `LoopView` after every loop.
        """
        rule = as_rule(n_loops, stop, self.cfg.max_loops)
        context = self.context(tokens, attention_mask)
        if rows is not None and (rows.dtype != torch.bool or rows.shape != tokens.shape):
            raise UsageError(f"rows must be boolean with one entry per token, {list(tokens.shape)}")
        x = self.prelude(tokens, context, taps)
        done = iterate(self, x, context, rule, taps, on_loop)
        if done.after_coda is not None and not self._heard(taps):  # the rule has been there already
            logits = self.unembedding(done.after_coda, rows=rows)
        else:
            logits = self.readout(done.state, context, taps, rows=rows)
        cost = done.flops + self._ends_flops(tokens, rows, coda=done.after_coda is None)
        return LoopOutput(logits, done.loops_used, done.criterion, cost, done.token_loops)

    def _ends_flops(self, tokens: Tensor, rows: Tensor | None, coda: bool) -> Tensor | int:
        drawn = None if rows is None else rows.sum(-1)
        cost = flops.readout_flops(self.cfg, tokens.shape[1], drawn, coda)
        return self.cfg.n_prelude_layers * flops.layer_flops(self.cfg, tokens.shape[1]) + cost

    def context(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Context:
        """Check the input and build what all layers share."""
        self._check_tokens(tokens)
        keys = None if attention_mask is None else self._check_attention_mask(attention_mask, tokens)
        shared = None if keys is None else keys[:, None, None, :]
        allowed: dict[str, Tensor | None] = {segment: shared for segment in SEGMENTS}
        masked = tokens == self.cfg.mask_token_id
        if self.cfg.forbid_mask_to_mask:
            apart = ~(masked[:, None, :, None] & masked[:, None, None, :])
            allowed |= dict.fromkeys(self.cfg.forbid_mask_to_mask, _and_itself(apart, keys))
        if self.cfg.forbid_masked_keys:
            clean = ~masked[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
            allowed |= dict.fromkeys(self.cfg.forbid_masked_keys, _and_itself(clean, keys))
        rotary = self.rotary_cos[: tokens.shape[1]], self.rotary_sin[: tokens.shape[1]]
        return Context(rotary, allowed, tokens, self.cfg.mask_token_id, keys)

    def prelude(self, tokens: Tensor, context: Context, taps: TapSource = no_taps) -> Tensor:
        """Embed and run the prelude layers: H(-1), [batch, pos, d_model]."""
        x = taps("")("hook_embed", self.embed(tokens))
        return self._layers("prelude", x, context, taps, "")

    def loop(self, x: Tensor, context: Context, loop: int, taps: TapSource = no_taps) -> Tensor:
        """Run the looped layers once as iteration `loop`: H(loop) from H(loop - 1)."""
        prefix = f"loop.{loop}."
        tap = taps(prefix)
        tap.enter(context)
        x = self._layers("loop", tap("hook_in", x), context, taps, prefix, held=context.held)
        return tap("hook_out", x)

    def coda(
        self, state: Tensor, context: Context, taps: TapSource = no_taps, *, rows: Tensor | None = None
    ) -> Tensor:
        """Run the coda layers on a loop's output, [batch, pos, d_model].

        With `rows` [batch, pos] the last layer updates those positions only: nobody reads the others.
        """
        layers = self.cfg.layers("coda")
        if rows is None or not layers:
            return self._layers("coda", state, context, taps, "")
        x = self._layers("coda", state, context, taps, "", layers[:-1])
        return self._layers("coda", x, context, taps, "", layers[-1:], held=~rows)

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

    def _heard(self, taps: TapSource) -> bool:
        """Whether anybody listens to the coda or to what follows it."""
        prefixes = ["", *(f"blocks.{layer}." for layer in self.cfg.layers("coda"))]
        return any(taps(prefix) is not NO_TAP for prefix in prefixes)

    def unembedding(self, x: Tensor, taps: TapSource = no_taps, rows: Tensor | None = None) -> Tensor:
        """Final norm and unembedding of states [..., d_model], or of `rows` of them; [MASK] gets -inf."""
        tap = taps("")
        logits = self.unembed(self.ln_final(x if rows is None else x[rows], tap))
        logits[..., self.cfg.mask_token_id] = float("-inf")
        return tap("hook_logits", logits)

    def states(
        self, tokens: Tensor, n_loops: int, attention_mask: Tensor | None = None, taps: TapSource = no_taps
    ) -> Iterator[tuple[Tensor, Context]]:
        """Yield H(0), H(1), .. of one trajectory with its context; `readout(H(i), ...)` is S = i + 1."""
        context = self.context(tokens, attention_mask)
        x = self.prelude(tokens, context, taps)
        for loop in range(check_count("n_loops", n_loops)):
            x = self.loop(x, context, loop, taps)
            yield x, context

    def _layers(
        self,
        segment: str,
        x: Tensor,
        context: Context,
        taps: TapSource,
        prefix: str,
        layers: range | None = None,
        held: Tensor | None = None,
    ) -> Tensor:
        blocks, allowed = cast(list[Block], list(self.blocks)), context.allowed[segment]
        for layer in self.cfg.layers(segment) if layers is None else layers:
            tap = taps(f"{prefix}blocks.{layer}.")
            tap.enter(context)
            if held is None:
                x = blocks[layer](x, context.rotary, allowed, tap)
            elif tap is NO_TAP:
                x = blocks[layer].skip(x, context.rotary, allowed, held)
            else:
                x = blocks[layer](x, context.rotary, allowed, tap, held)
        return x

    # --- input checks ---

    def _check_tokens(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise UsageError(f"tokens must be an integer tensor (int64 or int32), got {kind}")
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise UsageError(f"tokens must be a non-empty [batch, pos] tensor, got shape {list(tokens.shape)}")
        if tokens.shape[1] > self.cfg.n_ctx:
            raise UsageError(f"sequence of {tokens.shape[1]} tokens exceeds n_ctx = {self.cfg.n_ctx}; shorten it")
        low, high = (int(value) for value in torch.aminmax(tokens))
        if low < 0 or high >= self.cfg.d_vocab:
            wrong = low if low < 0 else high
            raise UsageError(
                f"token id {wrong} is outside 0..{self.cfg.d_vocab - 1}; use this model's own tokenizer"
            )

    @staticmethod
    def _check_attention_mask(attention_mask: Tensor, tokens: Tensor) -> Tensor:
        if not isinstance(attention_mask, Tensor):
            raise UsageError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
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

    # --- on disk ---

    @property
    def n_parameters(self) -> int:
        """Parameters stored (looped layers counted once)."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` and `config.json`; `dtype` converts what is stored."""
        checkpoints.save_weights(folder, self.cfg, self.state_dict(), dtype)

    @classmethod
    def from_pretrained(cls, name: Path | str, device: str | torch.device = "cpu") -> "LoopMDM":
        """Load a shipped name, a run folder or a hub id; strict on names and shapes; float32, eval mode."""
        folder = checkpoints.resolve(name)
        cfg = LoopMDMConfig.load(checkpoints.need(folder, "config.json"))
        model = cls(cfg)
        model.load_state_dict(checkpoints.load_weights(folder, model.state_dict()))
        return model.to(device).eval()


def _and_itself(allowed: Tensor, keys: Tensor | None) -> Tensor:
    """Edges `allowed` [batch, 1, query, key] to real keys, and every position's own."""
    allowed = allowed if keys is None else allowed & keys[:, None, None, :]
    return allowed | torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
