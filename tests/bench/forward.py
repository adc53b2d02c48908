"""Forwards, caching, attention masses, importing."""

import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmdm.analysis.measures.attention import mask_attention
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.layers import rotary_tables
from tests.bench.common import Row, at_most, median_peak, peak_kib, ratio, shape


class PlainBlock(nn.Module):
    """The same layer as `layers.Block`, written without taps: the twin that forwards are compared with."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pre-norm attention and MLP."""
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = (torch.cat([-z.chunk(2, -1)[1], z.chunk(2, -1)[0]], -1) * sin + z * cos for z in (q, k))
        z = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.out(z.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class PlainMDM(nn.Module):
    """Embedding, plain blocks, norm, unembedding."""

    def __init__(self, cfg: LoopMDMConfig):
        super().__init__()
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.blocks = nn.ModuleList(PlainBlock(cfg.d_model, cfg.n_heads) for _ in range(cfg.n_layers))
        self.ln, self.unembed = nn.LayerNorm(cfg.d_model), nn.Linear(cfg.d_model, cfg.d_vocab)
        cos, sin = rotary_tables(cfg)
        self.register_buffer("cos", cos[:, 0])
        half = cfg.d_head // 2
        self.register_buffer("sin", torch.cat([-sin[:, 0, :, :half], sin[:, 0, :, half:]], dim=-1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits with the last id at -inf."""
        x = self.embed(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.unembed(self.ln(x))
        logits[..., -1] = float("-inf")
        return logits


def _tokens(cfg: LoopMDMConfig, batch: int) -> Tensor:
    tokens = torch.randint(0, cfg.d_vocab - 1, (batch, cfg.n_ctx), generator=torch.Generator().manual_seed(0))
    return mask_tokens(tokens, cfg.mask_token_id, mask_ratio=0.5).tokens


def forward() -> Iterator[Row]:
    """Forward without listeners against a plain twin."""
    yield _forward("forward, d=256 6 layers T=128, / plain twin", shape(256, 6, 128), 8, 1.05, 1)
    yield _forward("forward, tiny (d=32 4 layers T=16), / plain twin", shape(32, 4, 16, vocab=64), 1, 1.10, 50)


def _forward(name: str, cfg: LoopMDMConfig, batch: int, goal: float, inner: int) -> Row:
    hooked, plain, tokens = HookedLoopMDM(cfg), PlainMDM(cfg).eval(), _tokens(cfg, batch)
    with torch.inference_mode():
        return at_most(name, ratio(lambda: hooked(tokens), lambda: plain(tokens), 41, inner), goal)


def caching() -> Iterator[Row]:
    """Caching every loop's patterns against the forward."""
    cfg = shape(256, 6, 128, loops=6)
    m, tokens = HookedLoopMDM(cfg), _tokens(cfg, 8)
    keep = lambda name: name.endswith("hook_pattern")  # noqa: E731
    with torch.inference_mode():
        value = ratio(lambda: m.run_with_cache(tokens, names_filter=keep), lambda: m(tokens))
    yield at_most("caching patterns of all loops, / forward", value, 1.3)


def masses() -> Iterator[Row]:
    """mask_attention's masses at S = 12 against an eager-attention forward, and its memory."""
    cfg = shape(256, 6, 128, loops=12)
    m = HookedLoopMDM(cfg)
    tokens = torch.randint(0, cfg.d_vocab - 1, (8, 128), generator=torch.Generator().manual_seed(0))
    b = mask_tokens(tokens, cfg.mask_token_id, mask_ratio=0.5)
    with torch.inference_mode():
        value = ratio(lambda: mask_attention(m, b, content=False), lambda: m(b.tokens, attn_path="eager"))
    yield at_most("mask_attention masses at S=12, / eager forward", value, 1.5)
    growth = median_peak("forward", 12) / median_peak("forward", 2)
    # Keeping the patterns of ten more loops would add a third; what is left is the allocator's scatter.
    yield at_most("peak memory of mask_attention, S=12 / S=2", growth, 1.05)


def once(n_loops: int) -> None:
    """Run mask_attention once and print the process's peak memory."""
    cfg = shape(128, 4, 256, loops=12)
    tokens = torch.randint(0, cfg.d_vocab - 1, (16, 256), generator=torch.Generator().manual_seed(0))
    b = mask_tokens(tokens, cfg.mask_token_id, mask_ratio=0.5)
    mask_attention(HookedLoopMDM(cfg), b, n_loops=n_loops, batch_size=16)
    print(peak_kib())


def importing() -> Iterator[Row]:
    """What `import loopmdm.model` adds to `import torch`, in seconds of a process of its own."""
    code = "import time, torch; t = time.perf_counter(); import loopmdm.model; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    yield at_most("import loopmdm.model beyond torch", statistics.median(times), 0.5, " s")
