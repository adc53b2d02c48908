"""LoopMDM: a masked diffusion language model whose middle layers run S times with shared weights.

    H(-1) = prelude(tokens),   H(i) = loop(H(i-1)) for i = 0..S-1,   logits = unembed(ln(coda(H(S-1))))

There is no time input, no input injection, no loop embedding and no loss on inner loops: the
equations of "Looped Diffusion Language Models" (arXiv 2605.26106) show none. It follows that loop
i's states are the same for every S > i, and that the coda read-out after loop i *is* the model at
n_loops = i + 1. Both hold, too, in the arms that the config can turn on beside the paper's model
(`LoopMDMConfig`: injection, sandwich norms, scaled updates), none of which looks at S.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.layout import SEGMENTS
from loopmdm.model.network import checkpoints
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.layers import Block, Injection, Norm, rotary_tables
from loopmdm.model.protocol import Core, check_attention_mask, check_tokens
from loopmdm.model.taps import NO_TAP, Tap, TapSource, no_taps


@dataclass(slots=True, kw_only=True)
class LoopMDMContext(Context):
    """A context with the rotary tables, and who may attend to whom.

    `allowed` [batch, 1, 1 or query, key] or None per segment; `entered` [batch, pos, d_model] is what the prelude
    gave, kept by models that inject it.
    """

    rotary: tuple[Tensor, Tensor]
    allowed: dict[str, Tensor | None]
    entered: Tensor | None = None

    def rows(self, keep: Tensor) -> "LoopMDMContext":
        """The context of the sequences `keep` (index or boolean [batch])."""
        allowed = {name: None if mask is None else mask[keep] for name, mask in self.allowed.items()}
        entered = None if self.entered is None else self.entered[keep]
        return replace(cast(LoopMDMContext, Context.rows(self, keep)), allowed=allowed, entered=entered)


class LoopMDM(Core):
    """The model in plain torch. `taps` arguments let others listen (see `taps.py`)."""

    cfg: LoopMDMConfig
    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, cfg: LoopMDMConfig):
        super().__init__()
        if not isinstance(cfg, LoopMDMConfig):
            raise UsageError(
                f"LoopMDM takes a LoopMDMConfig, got {cfg!r:.60}; LoopMDM.from_pretrained takes a name"
            )
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, cfg.segment(layer) == "loop") for layer in range(cfg.n_layers))
        self.injection = Injection(cfg.d_model) if cfg.input_injection == "decay" else None
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

    # --- the parts of a forward; `Core` puts them together ---

    def context(self, tokens: Tensor, attention_mask: Tensor | None = None) -> LoopMDMContext:
        """Check the input and build what all layers share."""
        check_tokens(self.cfg, tokens)
        keys = check_attention_mask(attention_mask, tokens)
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
        return LoopMDMContext(tokens, self.cfg.mask_token_id, keys, rotary=rotary, allowed=allowed)

    def enter(self, tokens: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """Token embeddings."""
        return self.embed(tokens)

    def prelude(self, tokens: Tensor, context: LoopMDMContext, taps: TapSource = no_taps) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Embed and run the prelude layers: H(-1), kept in the context where loops inject it."""
        x = super().prelude(tokens, context, taps)
        if self.injection is not None:
            context.entered = x
        return x

    def layers(
        self,
        segment: str,
        x: Tensor,
        context: LoopMDMContext,
        taps: TapSource,
        prefix: str = "",
        among: range | None = None,
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The layers of a segment; a loop begins with the injection, after which held positions get their x back.

        Others attend to held positions with the injection: had these converged, holding would change nothing.
        """
        if segment != "loop" or self.injection is None:
            return super().layers(segment, x, context, taps, prefix, among)
        if context.entered is None:
            raise UsageError(
                "this model's loops need what its prelude left: take state and context from m.states(tokens)"
            )
        mixed = self.injection(x, context.entered)
        out = super().layers(segment, mixed, context, taps, prefix, among)
        return out if context.held is None else torch.where(context.held[..., None], x, out)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        n_loops: int | None = None,
        attention_mask: Tensor | None = None,
        taps: TapSource = no_taps,
        *,
        earlier: int | None = None,
        rows: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "*two batch pos d_vocab"] | Float[Tensor, "*two row d_vocab"]:
        """As `Core.forward`; with `earlier`, a smaller loop count, logits of both, [2, batch, pos, d_vocab].

        With `rows` the coda runs everywhere, but those positions alone are unembedded: [row, d_vocab], in reading
        order. For training, whose wrappers know no other entry.
        """
        if earlier is None and rows is None:
            return super().forward(tokens, n_loops, attention_mask, taps)
        n_loops = check_count("n_loops", self.cfg.max_loops if n_loops is None else n_loops)
        if earlier is not None and check_count("earlier", earlier) >= n_loops:
            raise UsageError(f"earlier must be below n_loops {n_loops}, got {earlier}")
        context, found = self.context(tokens, attention_mask), []
        x = self.prelude(tokens, context, taps)
        for loop in range(n_loops):
            x = self.loop(x, context, loop, taps)
            if loop + 1 in (earlier, n_loops):
                found.append(self.unembedding(self.coda(x, context, taps), taps, rows))
        return found[0] if earlier is None else torch.stack(found)

    def layer(
        self, layer: int, x: Tensor, context: LoopMDMContext, tap: Tap = NO_TAP, held: Tensor | None = None
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One application of physical `layer`; `held` positions keep x, and cost nothing if nobody listens."""
        block, allowed = self.block(layer), context.allowed[self.cfg.segment(layer)]
        if held is None:
            return block(x, context.rotary, allowed, tap)
        if tap is NO_TAP:
            return block.skip(x, context.rotary, allowed, held)
        return block(x, context.rotary, allowed, tap, held)

    def block(self, layer: int) -> Block:
        """The module of physical `layer`."""
        return cast(Block, self.blocks[layer])

    def unembedding(self, x: Tensor, taps: TapSource = no_taps, rows: Tensor | None = None) -> Tensor:
        """Final norm and unembedding of states [..., d_model], or of `rows` of them; [MASK] gets -inf."""
        tap = taps("")
        logits = self.unembed(self.ln_final(x if rows is None else x[rows], tap))
        return tap("hook_logits", self._closed(logits))

    def _closed(self, logits: Tensor) -> Tensor:
        """Logits with -inf at [MASK], in place where nobody differentiates: they are the largest tensor there is.

        Elsewhere a copy: FSDP wraps what comes out of a module, and dies of a write into it.
        """
        mask_token_id = self.cfg.mask_token_id
        if not logits.requires_grad:
            logits[..., mask_token_id] = float("-inf")
            return logits
        return logits.index_fill(-1, torch.full((1,), mask_token_id, device=logits.device), float("-inf"))

    # --- what measures ask of the weights ---

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, and so of the states."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def mask_vector(self) -> Float[Tensor, " d_model"]:
        """The embedding of [MASK]."""
        return self.embed.weight[self.cfg.mask_token_id]

    def output_weight(self, layer: int) -> Float[Tensor, "d_model width"]:
        """The weight that takes all heads' z, side by side, to the stream."""
        return self.block(layer).attn.out.whole_weight

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """The bias that comes with `output_weight`; zero where there is none."""
        return self.block(layer).attn.out.whole_bias

    def readout_weights(self) -> tuple[Norm, nn.Linear]:
        """The final norm and the unembedding."""
        return self.ln_final, self.unembed

    def looping(self, first: int, n_layers: int, max_loops: int = 1) -> "LoopMDM":
        """The same weights with other layers looped; at n_loops = 1 it is the model it was made from.

        UsageError where looped layers have something that others lack: norms of their own, or a scale by S_max.
        """
        self._check_looping(first, n_layers, max_loops)
        fields = self.cfg.to_dict() | self.cfg.segmented(first, n_layers, max_loops)
        with torch.device("meta"):
            other = LoopMDM(LoopMDMConfig.from_dict(fields))
        other.load_state_dict(self.state_dict(), assign=True)
        other.rotary_cos, other.rotary_sin = self.rotary_cos, self.rotary_sin
        return other.train(self.training)

    def _check_looping(self, first: int, n_layers: int, max_loops: int) -> None:
        own, cfg = self.cfg.layers("loop"), self.cfg
        moved = range(first, first + n_layers) != own
        if cfg.sandwich_norm and moved:
            raise UsageError(f"only layers {[*own]} have norms after attention and MLP; no others can loop")
        if cfg.scaled_residual and (moved or max_loops != cfg.max_loops):
            raise UsageError(
                f"layers {[*own]} add 1 / sqrt({cfg.max_loops}) of what they compute; no others can loop, and "
                f"max_loops must stay {cfg.max_loops} (n_loops of a call is free)"
            )

    # --- on disk ---

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` and `config.json`; `dtype` converts what is stored."""
        checkpoints.save_weights(folder, self.cfg, self.state_dict(), dtype)

    @classmethod
    def from_pretrained(cls, name: Path | str, device: str | torch.device = "cpu") -> "LoopMDM":
        """Load a shipped name, a run folder or a hub id; strict on names and shapes; float32, eval mode."""
        place = checkpoints.check_device(device)
        folder = checkpoints.resolve(name)
        cfg = LoopMDMConfig.load(checkpoints.need(folder, "config.json"))
        with torch.device("meta"), checkpoints.Uninitialised():
            checkpoints.check_sizes(folder, cls(cfg).state_dict())
        model = cls(cfg)
        model.load_state_dict(checkpoints.load_weights(folder, model.state_dict()))
        return model.to(place).eval()


def _and_itself(allowed: Tensor, keys: Tensor | None) -> Tensor:
    """Edges `allowed` [batch, 1, query, key] to real keys, and every position's own."""
    allowed = allowed if keys is None else allowed & keys[:, None, None, :]
    return allowed | torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
