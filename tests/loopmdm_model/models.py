"""Toy models that are no LoopMDM."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from loopmdm.model.context import Context
from loopmdm.model.layout import Facts, Layout
from loopmdm.model.protocol import Core, check_attention_mask, check_tokens
from loopmdm.model.taps import NO_TAP, no_taps


@dataclass(frozen=True, kw_only=True)
class ToyLayout(Layout):
    """One looped layer of attention alone."""

    d_vocab: int = 23
    n_ctx: int = 16
    d_model: int = 16
    n_heads: int = 2
    d_head: int = 8
    d_mlp: int = 1
    n_prelude_layers: int = 0
    n_loop_layers: int = 1
    n_coda_layers: int = 0
    max_loops: int = 3
    mask_token_id: None = None
    leaves: tuple = ("hook_resid_pre", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_resid_post")
    outer_leaves: tuple = ("hook_embed", "hook_logits")
    facts = Facts(mask_token_id=None, causal=True, additive=False, random_start=True)


@dataclass(slots=True, kw_only=True)
class ToyContext(Context):
    """What is injected before every application, and the first state."""

    injected: torch.Tensor
    start: torch.Tensor

    def rows(self, keep):
        return replace(Context.rows(self, keep), injected=self.injected[keep], start=self.start[keep])


class InjectedToy(Core):
    """x <- (x + e) + attention(x + e), causal, from a random first state."""

    def __init__(self, cfg=ToyLayout()):
        super().__init__()
        self.cfg, width = cfg, cfg.n_heads * cfg.d_head
        self.embed, self.qkv = nn.Embedding(cfg.d_vocab, cfg.d_model), nn.Linear(cfg.d_model, 3 * width)
        self.out, self.head = nn.Linear(width, cfg.d_model), nn.Linear(cfg.d_model, cfg.d_vocab)

    def context(self, tokens, attention_mask=None):
        check_tokens(self.cfg, tokens)
        keys = check_attention_mask(attention_mask, tokens)
        generators = [torch.Generator().manual_seed(row) for row in range(len(tokens))]
        start = torch.stack([torch.randn(tokens.shape[1], self.cfg.d_model, generator=g) for g in generators])
        return ToyContext(tokens, None, keys, injected=self.embed(tokens), start=start)

    def enter(self, tokens, context):
        return context.start

    def layer(self, layer, x, context, tap=NO_TAP, held=None):
        before, x = x, tap("hook_resid_pre", x) + context.injected
        q, k, v = self.qkv(x).unflatten(-1, (3, self.cfg.n_heads, -1)).unbind(2)
        open_keys = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & context.real[:, None, None]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.cfg.d_head**0.5
        pattern = tap("attn.hook_pattern", scores.masked_fill(~open_keys, -1e9).softmax(-1))
        z = tap("attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, tap("attn.hook_v", v)))
        out = F.layer_norm(x + self.out(z.flatten(-2)), x.shape[-1:])
        return tap("hook_resid_post", out if held is None else torch.where(held[..., None], before, out))

    def unembedding(self, x, taps=no_taps, rows=None):
        return taps("")("hook_logits", self.head(x if rows is None else x[rows]))

    def output_weight(self, layer):
        return self.out.weight
