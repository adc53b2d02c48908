"""Small stand-ins for models whose code lies beside their weights: the same module trees and calls, nothing else.

Each is named as its original's class, so that the record finds it. Attention is torch's fused function, called in
the ways that the originals call it.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

V, D, HEADS = 40, 16, 2


def config(**sizes) -> SimpleNamespace:
    return SimpleNamespace(**({"vocab_size": V, "hidden_size": D, "num_attention_heads": HEADS} | sizes))


def prepared(model: nn.Module) -> nn.Module:
    """The same weights each time."""
    weights, biases = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=weights) * 0.3
        elif name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=biases) * 0.1
    return model.eval()


def heads(x, n=HEADS):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def joined(z):
    return z.transpose(1, 2).flatten(-2)


def turned(x, base):
    """Rotary positions of [batch, head, pos, d], halves split."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * float(base) ** -(torch.arange(half) / half)
    one, two = x.chunk(2, -1)
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


class Swiglu(nn.Module):
    def __init__(self, inner=24):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, inner, bias=False), nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# --- masked diffusion ---


class LLaDABlock(nn.Module):
    """Attention in the block itself; returns the stream and a cache."""

    def __init__(self, sizes):
        super().__init__()
        d, inner, self.sizes = sizes.d_model, sizes.mlp_hidden_size, sizes
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(d, d, bias=False))
        self.ff_proj, self.up_proj = nn.Linear(d, inner, bias=False), nn.Linear(d, inner, bias=False)
        self.ff_out = nn.Linear(inner, d, bias=False)
        self.attn_norm, self.ff_norm = nn.RMSNorm(d), nn.RMSNorm(d)

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        y = self.attn_norm(x)
        q, k, v = (heads(part(y), self.sizes.n_heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (turned(part, self.sizes.rope_theta) if self.sizes.rope else part for part in (q, k))
        x = x + self.attn_out(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias)))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y)), None


class LLaDAModelLM(nn.Module):
    """A vocabulary padded to embedding_size; padding as an additive bias."""

    def __init__(self, **changes):
        super().__init__()
        sizes = {"vocab_size": V, "embedding_size": V + 4, "mask_token_id": 21, "max_sequence_length": 16}
        sizes |= {"d_model": D, "n_heads": HEADS, "n_layers": 3, "mlp_hidden_size": 24}
        self.config = SimpleNamespace(**(sizes | {"rope": True, "rope_theta": 500_000.0} | changes))
        d, rows = self.config.d_model, self.config.embedding_size
        blocks = nn.ModuleList(LLaDABlock(self.config) for _ in range(self.config.n_layers))
        parts = {"wte": nn.Embedding(rows, d), "blocks": blocks}
        parts |= {"ln_f": nn.RMSNorm(d), "ff_out": nn.Linear(d, rows, bias=False)}
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})

    def forward(self, input_ids, attention_mask=None):
        parts = self.model["transformer"]
        bias = None
        if attention_mask is not None:
            bias = (1.0 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min
        x = parts["wte"](input_ids)
        for block in parts["blocks"]:
            x, _ = block(x, attention_bias=bias)
        return SimpleNamespace(logits=parts["ff_out"](parts["ln_f"](x)))


class SelfAttention(nn.Module):
    """Llama's names; one key head for two query heads."""

    def __init__(self, bias=False):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(D, D, bias=bias), nn.Linear(D, D, bias=False)
        self.k_proj, self.v_proj = nn.Linear(D, D // 2, bias=bias), nn.Linear(D, D // 2, bias=bias)

    def forward(self, x, mask=None, causal=False):
        k, v = (heads(part(x), 1).expand(-1, HEADS, -1, -1) for part in (self.k_proj, self.v_proj))
        return self.o_proj(joined(F.scaled_dot_product_attention(heads(self.q_proj(x)), k, v, mask, 0.0, causal)))


class Decoder(nn.Module):
    def __init__(self, mlp=None, sandwich=False, bias=False):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(bias), mlp or Swiglu()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.causal, self.sandwich = sandwich, sandwich
        if sandwich:
            self.input_layernorm_2, self.post_attention_layernorm_2 = nn.RMSNorm(D), nn.RMSNorm(D)

    def forward(self, hidden_states, attention_mask=None):
        y = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, self.causal and attention_mask is None
        )
        x = hidden_states + (self.input_layernorm_2(y) if self.sandwich else y)
        y = self.mlp(self.post_attention_layernorm(x))
        return (x + (self.post_attention_layernorm_2(y) if self.sandwich else y),)


class Stack(nn.Module):
    def __init__(self, layers, embedding="embed_tokens"):
        super().__init__()
        setattr(self, embedding, nn.Embedding(V, D))
        self.layers, self.norm = nn.ModuleList(layers), nn.RMSNorm(D)


class DreamModel(nn.Module):
    """Grouped heads; the mask is the word "full" or edges; the state before a position predicts it."""

    def __init__(self):
        super().__init__()
        self.config = config(num_key_value_heads=1, mask_token_id=30, max_position_embeddings=16)
        self.model, self.lm_head = Stack([Decoder(bias=True) for _ in range(3)]), nn.Linear(D, V, bias=False)

    def forward(self, input_ids, attention_mask=None, use_cache=True):
        assert not use_cache
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x, attention_mask=None if attention_mask == "full" else attention_mask)[0]
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, hidden_states, attention_mask):
        q, k, v = (heads(part) for part in self.query_key_value(hidden_states).chunk(3, -1))
        return self.dense(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask))), None


class Experts(nn.Module):
    """Four experts, of which a token meets two, and one that all meet."""

    def __init__(self):
        super().__init__()
        self.gate, self.shared_experts = nn.Linear(D, 4, bias=False), Swiglu(8)
        self.experts = nn.ModuleList(Swiglu(8) for _ in range(4))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        total = self.shared_experts(x)
        for index, expert in enumerate(self.experts):
            total = total + expert(x) * (weight * (chosen == index)).sum(-1, keepdim=True)
        return total


class LLaDA2Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.attention, self.mlp = FusedAttention(), mlp
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(D), nn.RMSNorm(D)

    def forward(self, hidden_states, attention_mask=None):
        out, _ = self.attention(hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask)
        x = hidden_states + out
        return (x + self.mlp(x=self.post_attention_layernorm(x)),)


class LLaDA2MoeModelLM(nn.Module):
    """A first dense layer, then experts; the mask has one entry an edge."""

    def __init__(self):
        super().__init__()
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "mask_token_id": 35}
        self.config = config(max_position_embeddings=16, **sizes)
        layers = [LLaDA2Block(Swiglu()), LLaDA2Block(Experts()), LLaDA2Block(Experts())]
        self.model, self.lm_head = Stack(layers, "word_embeddings"), nn.Linear(D, V, bias=False)

    def forward(self, input_ids, attention_mask, use_cache=True):
        assert attention_mask.ndim == 4
        x = self.model.word_embeddings(input_ids)
        for layer in self.model.layers:
            x = layer(x, attention_mask=attention_mask)[0]
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


class Table(nn.Module):
    """An embedding that keeps a bare parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(V, D))

    def forward(self, x):
        return self.embedding[x]


class Norm(nn.Module):
    """LayerNorm with a weight and no bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D, generator=torch.Generator().manual_seed(0)) + 0.5)

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight


def modulated(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Norms that a condition shifts and scales, and gates; the fused function called by keywords."""

    def __init__(self):
        super().__init__()
        self.attn_qkv, self.attn_out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))
        self.norm1, self.norm2, self.adaLN_modulation = Norm(), Norm(), nn.Linear(8, 6 * D)

    def forward(self, x, rotary, c, mask=None):
        shift, scale, gate, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, -1)
        q, k, v = (heads(part) for part in self.attn_qkv(modulated(self.norm1(x), shift, scale)).chunk(3, -1))
        q, k = turned(q, 10_000), turned(k, 10_000)
        out = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, is_causal=False)
        x = x + gate[:, None] * self.attn_out(joined(out))
        return x + gate_2[:, None] * self.mlp(modulated(self.norm2(x), shift_2, scale_2))


class DiTHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final = Norm()
        self.linear, self.adaLN_modulation = nn.Linear(D, V), nn.Linear(8, 2 * D)

    def forward(self, x, c):
        return self.linear(modulated(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, -1)))


class Sigma(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(1, 8)

    def forward(self, sigma):
        return self.mlp(sigma[:, None])


class MDLM(nn.Module):
    """A time input that is always zero."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=V, hidden_dim=D, n_heads=HEADS, model_length=16, mask_token_id=V - 1
        )
        self.backbone = nn.Module()
        self.backbone.vocab_embed, self.backbone.sigma_map = Table(), Sigma()
        self.backbone.blocks, self.backbone.output_layer = nn.ModuleList(DiTBlock() for _ in range(3)), DiTHead()

    def edges(self, n):
        return None

    def forward(self, input_ids, timesteps):
        c = F.silu(self.backbone.sigma_map(torch.zeros_like(timesteps)))
        x = self.backbone.vocab_embed(input_ids)
        for block in self.backbone.blocks:
            x = block(x, None, c, mask=self.edges(x.shape[1]))
        return self.backbone.output_layer(x, c)


class BD3LM(MDLM):
    """Blocks of 4 see themselves and those before."""

    def edges(self, n):
        block = torch.arange(n) // 4
        return block[:, None] >= block[None, :]

    def forward(self, input_ids, timesteps, sample_mode=False):
        assert sample_mode
        return super().forward(input_ids, timesteps)


# --- loops of their own ---


class RavenAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.Wqkv, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x):
        q, k, v = (heads(part) for part in self.Wqkv(x).chunk(3, -1))
        return self.proj(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class RavenMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.proj = nn.Linear(D, 48, bias=False), nn.Linear(24, D, bias=False)

    def forward(self, x):
        gate, up = self.fc(x).chunk(2, -1)
        return self.proj(F.silu(gate) * up)


class RavenBlock(nn.Module):
    """The stream inside the norms; returns it with a map that nobody asked for."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = RavenAttention(), RavenMLP()
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (nn.RMSNorm(D) for _ in range(4))

    def forward(self, x, freqs_cis, step_idx, mask=None):
        x = self.norm_2(self.attn(self.norm_1(x)) + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x), None


class RavenForCausalLM(nn.Module):
    """Prelude, a core that runs `num_steps` from a random state with the prelude's output let in, coda."""

    normed_coda = True

    def __init__(self):
        super().__init__()
        sizes = {"n_embd": D, "n_heads": HEADS, "vocab_size": V, "block_size": 16, "mean_recurrence": 4}
        self.config = SimpleNamespace(**sizes, n_layers_in_prelude=1, n_layers_in_recurrent_block=2)
        parts = {"wte": nn.Embedding(V, D), "adapter": nn.Linear(2 * D, D, bias=False), "ln_f": nn.RMSNorm(D)}
        for name, n in (("prelude", 1), ("core_block", 2), ("coda", 1)):
            parts[name] = nn.ModuleList(RavenBlock() for _ in range(n))
        self.transformer, self.lm_head = nn.ModuleDict(parts), nn.Linear(D, V, bias=False)

    def initialize_state(self, embedded):
        return torch.nn.init.trunc_normal_(torch.empty_like(embedded), std=0.5)

    def forward(self, input_ids, num_steps=None):
        t, e = self.transformer, self.transformer["wte"](input_ids)
        for block in t["prelude"]:
            e, _ = block(e, None, 0)
        x = self.initialize_state(e)
        for _ in range(sum(num_steps or (self.config.mean_recurrence, 0))):
            x = t["adapter"](torch.cat([x, e], -1))
            for block in t["core_block"]:
                x, _ = block(x, None, 0)
        x = t["ln_f"](x) if self.normed_coda else x
        for block in t["coda"]:
            x, _ = block(x, None, 0)
        return {"logits": self.lm_head(t["ln_f"](x))}


class Retrofitted(RavenForCausalLM):
    normed_coda = False


class OuroForCausalLM(nn.Module):
    """All layers loop, the norm after each loop, a gate on what it gives."""

    def __init__(self, steps=3):
        super().__init__()
        self.config = config(num_key_value_heads=1, total_ut_steps=steps, max_position_embeddings=16)
        self.model, self.lm_head = Stack([Decoder(sandwich=True) for _ in range(2)]), nn.Linear(D, V, bias=False)
        self.model.early_exit_gate = nn.Linear(D, 1)

    def forward(self, input_ids, attention_mask=None, use_cache=True):
        assert not use_cache
        x, self.gates = self.model.embed_tokens(input_ids), []
        for _ in range(self.config.total_ut_steps):
            for layer in self.model.layers:
                x = layer(x, attention_mask=None)[0]
            x = self.model.norm(x)
            self.gates.append(self.model.early_exit_gate(x))
        return SimpleNamespace(logits=self.lm_head(x))


class TwoStateBlock(nn.Module):
    """Normed after each sublayer; the stream comes by keyword, behind another argument."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(), Swiglu()

    def forward(self, cos_sin, hidden_states):
        x = F.rms_norm(hidden_states + self.self_attn(hidden_states), (D,))
        return F.rms_norm(x + self.mlp(x), (D,))


class TwoStates(nn.Module):
    """Two cycles of two moves of the low state and one of the high one, which is read."""

    def __init__(self):
        super().__init__()
        self.config = config(num_key_value_heads=1, H_cycles=2, L_cycles=2, mask_token_id=3)
        self.inner = nn.Module()
        self.inner.embed_tokens, self.inner.lm_head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.inner.L_level = nn.Module()
        self.inner.L_level.layers = nn.ModuleList(TwoStateBlock() for _ in range(2))
        high, low = torch.randn(2, D, generator=torch.Generator().manual_seed(0))
        self.inner.H_init, self.inner.L_init = nn.Parameter(high), nn.Parameter(low)

    def forward(self, input_ids):
        inner = self.inner
        e = inner.embed_tokens(input_ids)
        high, low = inner.H_init.expand_as(e), inner.L_init.expand_as(e)
        for _ in range(self.config.H_cycles):
            for _ in range(self.config.L_cycles):
                low = self.moved(low + high + e)
            high = self.moved(high + low)
        return inner.lm_head(high)

    def moved(self, x):
        for layer in self.inner.L_level.layers:
            x = layer(cos_sin=None, hidden_states=x)
        return x
