"""The parts of one transformer layer: norm, rotary attention, MLP, block; and what may stand before a loop.

Leaf names offered to taps are TransformerLens'; axis order is [batch, pos, head, d_head] for
q/k/v/z and [batch, head, query, key] for scores and patterns.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.precision import wide
from loopmdm.model.taps import NO_TAP, Tap
from loopmdm.model.tiles import Asked

ACTIVATIONS = {
    "gelu_new": partial(F.gelu, approximate="tanh"),  # no lambda: models are pickled
    "gelu": F.gelu,
    "silu": F.silu,
}


class Norm(nn.Module):
    """LayerNorm ("LN") or RMSNorm ("RMS") over the last axis."""

    def __init__(self, cfg: LoopMDMConfig, prefix: str):
        super().__init__()
        self.eps = cfg.eps
        self.shape = (cfg.d_model,)
        self.scale_name, self.normalized_name = f"{prefix}hook_scale", f"{prefix}hook_normalized"
        self.centred = cfg.normalization_type == "LN"
        self.weight = nn.Parameter(torch.ones(cfg.d_model))
        self.bias = nn.Parameter(torch.zeros(cfg.d_model)) if self.centred and cfg.norm_bias else None

    def forward(self, x: Tensor, tap: Tap = NO_TAP) -> Tensor:
        """Normalise x [..., d_model]; offers `hook_scale` [..., 1] and `hook_normalized` [..., d_model]."""
        if tap.wants(self.scale_name):
            if self.centred:
                x = x - x.mean(-1, keepdim=True)
            scale = tap(self.scale_name, (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
            x = x / scale * self.weight
            x = x if self.bias is None else x + self.bias
        elif self.centred:
            x = F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        else:
            x = F.rms_norm(x, self.shape, self.weight, self.eps)
        return tap(self.normalized_name, x)


class Output(nn.Linear):
    """The map that writes to the stream: W x + b, times a constant `scale`, which the weights shown include."""

    def __init__(self, n_in: int, n_out: int, bias: bool, scale: float):
        super().__init__(n_in, n_out, bias=bias)
        self.scale = scale

    def forward(self, input: Float[Tensor, "*rows n_in"]) -> Float[Tensor, "*rows n_out"]:
        """W x + b, scaled."""
        return self.scaled(super().forward(input))

    def scaled(self, x: Tensor) -> Tensor:
        """`x` times the constant; itself, bit for bit, where that is 1."""
        return x if self.scale == 1 else x * self.scale

    @property
    def whole_weight(self) -> Float[Tensor, "n_out n_in"]:
        """The weight as the stream meets it."""
        return self.scaled(self.weight)

    @property
    def whole_bias(self) -> Float[Tensor, " n_out"]:
        """The bias as the stream meets it; zero where there is none."""
        return self.weight.new_zeros(self.out_features) if self.bias is None else self.scaled(self.bias)


class Injection(nn.Module):
    """Mixes what the prelude gave, e, into the state h before a loop: h <- a h + (1 - a) e, a = sigmoid(weight).

    One a per channel: the state is carried on by a diagonal map whose spectral radius is below 1 whatever is
    learned, as in Parcae (arXiv 2604.12946). There the input's gain is free of the decay. Here they sum to 1, so
    that e is where the mix rests, and the first loop, which gets e itself, is the plain model's bit for bit.
    At first a = 0.88: half of what one loop wrote is left five loops later.
    """

    START = 2.0

    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((d_model,), self.START))

    @property
    def decay(self) -> Float[Tensor, " d_model"]:
        """The share a of the state that is kept, per channel."""
        return self.weight.sigmoid()

    def forward(
        self, state: Float[Tensor, "batch pos d_model"], entered: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The mix of a state with e."""
        return torch.lerp(entered.to(state), state, self.decay.to(state))  # e + a (h - e): exact where h = e


def rotary_tables(cfg: LoopMDMConfig) -> tuple[Tensor, Tensor]:
    """Cosines, and sines signed for `rotate` (first half negative): [n_ctx, 1, 1, d_head]."""
    if torch.get_default_device().type == "meta":  # arithmetic there loads the compiler
        return torch.empty(cfg.n_ctx, 1, 1, cfg.d_head), torch.empty(cfg.n_ctx, 1, 1, cfg.d_head)
    half = torch.arange(0, cfg.d_head, 2, dtype=torch.float64) / cfg.d_head
    angle = torch.arange(cfg.n_ctx, dtype=torch.float64)[:, None] * cfg.rotary_base**-half
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return cos[:, None, None, :].float(), sin[:, None, None, :].float()


def rotate(x: Float[Tensor, "batch pos two head d_head"], cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x, in float32 or wider, back in x's dtype.

    Swapping the halves and a signed sine give [a cos - b sin, b cos + a sin] in three operations.
    """
    full = wide(x)
    turned = torch.addcmul(full * cos, full.roll(x.shape[-1] // 2, -1), sin)
    return turned if full is x else turned.to(x.dtype)


class Attention(nn.Module):
    """Bidirectional multi-head attention with rotary positions."""

    def __init__(self, cfg: LoopMDMConfig, scale: float = 1.0):
        super().__init__()
        width = cfg.n_heads * cfg.d_head
        self.n_heads, self.d_head = cfg.n_heads, cfg.d_head
        self.qkv = nn.Linear(cfg.d_model, 3 * width, bias=cfg.attn_bias)
        self.out = Output(width, cfg.d_model, cfg.attn_bias, scale)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        rotary: tuple[Tensor, Tensor],
        allowed: Bool[Tensor, "batch one query key"] | None,
        tap: Tap = NO_TAP,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attend; SDPA unless the tap listens inside or attends itself. `allowed`: False = may not attend."""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, self.d_head))
        qk = qkv[:, :, :2]  # rotated in one go
        if tap.wants("attn.hook_q", "attn.hook_k"):
            qk = torch.stack([tap("attn.hook_q", qk[:, :, 0]), tap("attn.hook_k", qk[:, :, 1])], dim=2)
        q, k = rotate(qk, *rotary).unbind(2)
        q, k = tap("attn.hook_rot_q", q).transpose(1, 2), tap("attn.hook_rot_k", k).transpose(1, 2)
        v = tap("attn.hook_v", qkv[:, :, 2]).transpose(1, 2)
        if tap.explicit or tap.wants("attn.hook_attn_scores", "attn.hook_pattern"):
            z = self._explicit(q, k, v, allowed, tap)
        elif (attend := tap.attend) is not None:
            z = attend(Asked(q, k, v, allowed))
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        z = tap("attn.hook_z", z.transpose(1, 2))
        if tap.wants("attn.hook_result"):
            return self._per_head(z, tap)
        return self.out(z.flatten(-2))

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, tap: Tap) -> Tensor:
        scores = (q * self.d_head**-0.5) @ k.transpose(-1, -2)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        scores = tap("attn.hook_attn_scores", scores)
        pattern = tap("attn.hook_pattern", wide(scores).softmax(dim=-1).to(v.dtype))
        return pattern @ v

    def rows(
        self,
        x: Float[Tensor, "batch pos d_model"],
        index: Int[Tensor, "batch row"],
        rotary: tuple[Tensor, Tensor],
        allowed: Bool[Tensor, "batch one query key"] | None,
    ) -> Float[Tensor, "batch row d_model"]:
        """As `forward`, for the queries at positions `index` of each sequence only."""
        batch, width = torch.arange(len(x), device=x.device)[:, None], self.n_heads * self.d_head
        bias = (None, None) if self.qkv.bias is None else (self.qkv.bias[:width], self.qkv.bias[width:])
        q = F.linear(x[batch, index], self.qkv.weight[:width], bias[0]).unflatten(-1, (1, self.n_heads, -1))
        kv = F.linear(x, self.qkv.weight[width:], bias[1]).unflatten(-1, (2, self.n_heads, -1))
        q = rotate(q, rotary[0][index], rotary[1][index])[:, :, 0]
        k, v = rotate(kv[:, :, :1], *rotary)[:, :, 0], kv[:, :, 1]
        if allowed is not None and allowed.shape[2] > 1:
            allowed = allowed[batch, :, index].transpose(1, 2)
        z = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), attn_mask=allowed)
        return self.out(z.transpose(1, 2).flatten(-2))

    def _per_head(self, z: Tensor, tap: Tap) -> Tensor:
        weight = self.out.whole_weight.unflatten(1, (self.n_heads, self.d_head))
        result = tap("attn.hook_result", torch.einsum("bphd,mhd->bphm", z, weight))
        total = result.sum(dim=-2)
        return total if self.out.bias is None else total + self.out.whole_bias


class MLP(nn.Module):
    """Two-layer perceptron, gated (SwiGLU with silu) by configuration."""

    def __init__(self, cfg: LoopMDMConfig, scale: float = 1.0):
        super().__init__()
        self.act = ACTIVATIONS[cfg.act_fn]
        self.up = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias) if cfg.gated_mlp else None
        self.out = Output(cfg.d_mlp, cfg.d_model, cfg.mlp_bias, scale)

    def forward(self, x: Float[Tensor, "batch pos d_model"], tap: Tap = NO_TAP) -> Tensor:
        """Map x [batch, pos, d_model] to the same shape; `mlp.hook_pre` holds what the activation sees."""
        if self.gate is None:
            hidden = self.act(tap("mlp.hook_pre", self.up(x)))
        else:
            linear = tap("mlp.hook_pre_linear", self.up(x))
            hidden = self.act(tap("mlp.hook_pre", self.gate(x))) * linear
        return self.out(tap("mlp.hook_post", hidden))


class Block(nn.Module):
    """Pre-norm transformer layer: x + attn(ln1 x), then x + mlp(ln2 x).

    Looped ones may add scale * attn(ln1 x), or norm what they add, ln1_post(attn(ln1 x)), likewise of the MLP: the
    sandwich of Huginn (arXiv 2502.05171) and Ouro (arXiv 2510.25741). `hook_attn_out` and `hook_mlp_out` are what
    is added, as in TransformerLens; the outer norms offer nothing else. Their weights start at 1: what a looped
    layer adds is at first of size 1, far above embeddings of `initializer_range`.
    """

    def __init__(self, cfg: LoopMDMConfig, looped: bool = False):
        super().__init__()
        scale = cfg.residual_scale if looped else 1.0
        self.ln1, self.attn = Norm(cfg, "ln1."), Attention(cfg, scale)
        self.ln2, self.mlp = Norm(cfg, "ln2."), MLP(cfg, scale)
        normed = looped and cfg.sandwich_norm
        self.ln1_post = Norm(cfg, "ln1_post.") if normed else None
        self.ln2_post = Norm(cfg, "ln2_post.") if normed else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        allowed: Tensor | None,
        tap: Tap = NO_TAP,
        held: Bool[Tensor, "batch pos"] | None = None,
    ) -> Tensor:
        """Run one application of the layer on x [batch, pos, d_model].

        What attention and MLP would add at `held` positions is 0: the slow twin of `skip`, for listeners.
        """
        x = tap("hook_resid_pre", x)
        added = _normed(self.attn(self.ln1(x, tap), rotary, allowed, tap), self.ln1_post)
        x = x + tap("hook_attn_out", _silent(added, held))
        x = tap("hook_resid_mid", x)
        added = _normed(self.mlp(self.ln2(x, tap), tap), self.ln2_post)
        x = x + tap("hook_mlp_out", _silent(added, held))
        return tap("hook_resid_post", x)

    def skip(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor | None, held: Bool[Tensor, "batch pos"]
    ) -> Tensor:
        """As `forward`, but `held` positions keep x: attended to as they are, they cost keys and values only."""
        batch = torch.arange(len(x), device=x.device)[:, None]
        first = held.long().argsort(dim=1, stable=True)  # who moves comes first
        index = first[:, : int((~held).sum(1).max())]
        before = x[batch, index]
        after = before + _normed(self.attn.rows(self.ln1(x), index, rotary, allowed), self.ln1_post)
        after = after + _normed(self.mlp(self.ln2(after)), self.ln2_post)
        return x.index_put((batch, index), torch.where(held[batch, index][..., None], before, after))


def _normed(update: Tensor, norm: Norm | None) -> Tensor:
    return update if norm is None else norm(update)


def _silent(update: Tensor, held: Tensor | None) -> Tensor:
    return update if held is None else update.masked_fill(held[..., None], 0.0)
