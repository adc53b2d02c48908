"""Speed goals, measured as ratios in one run against what they are compared with; medians.

Machines are noisy: the two sides alternate, every ratio is the median of paired repeats, and what is
printed is the ratio and its goal, never a time.
"""

import dataclasses
import itertools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.attention import mask_attention
from analysis.textbook import enumerated_nelbo, textbook_sample
from loopmdm_model.checkpoints import TOKENIZER, resolve
from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.data.batches import spread as rows_of
from loopmdm_model.data.tokenizer import load_tokenizer
from loopmdm_model.errors import unknown_name
from loopmdm_model.evaluation import load_test_set
from loopmdm_model.hooked import HookedLoopMDM
from loopmdm_model.layers import rotary_tables
from loopmdm_model.likelihood import Estimator, draw_masks, masked_cross_entropy, nelbo, nelbo_by_loop
from loopmdm_model.masking import mask_tokens
from loopmdm_model.model import LoopMDM
from loopmdm_model.sampling import sample
from loopmdm_model.stopping import NoiseSchedule, StateDelta, StoppingRule
from loopmdm_model.training.trainer import compile_blocks

Row = tuple[str, str, str, str]


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


def ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 25, inner: int = 1) -> float:
    """Median over alternating repeats of time(ours) / time(theirs)."""

    def clock(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return time.perf_counter() - start

    clock(ours), clock(theirs)
    ratios = []
    for repeat in range(repeats):
        pair = [clock(theirs), clock(ours)] if repeat % 2 else [clock(ours), clock(theirs)][::-1]
        ratios.append(pair[1] / pair[0])
    return statistics.median(ratios)


def shape(d: int, layers: int, length: int, loops: int = 1, heads: int = 4, vocab: int = 1024) -> LoopMDMConfig:
    """A config with one looped layer in the middle."""
    sizes = {"d_vocab": vocab, "n_ctx": length, "d_model": d, "n_heads": heads, "max_loops": loops}
    return LoopMDMConfig(**sizes, n_prelude_layers=1, n_loop_layers=1, n_coda_layers=layers - 2)


def _tokens(cfg: LoopMDMConfig, batch: int) -> Tensor:
    tokens = torch.randint(0, cfg.d_vocab - 1, (batch, cfg.n_ctx), generator=torch.Generator().manual_seed(0))
    return mask_tokens(tokens, cfg.mask_token_id, mask_ratio=0.5).tokens


def at_most(name: str, value: float, goal: float, unit: str = "x") -> Row:
    """A row whose goal is an upper bound."""
    return name, f"{value:.3f}{unit}", f"<= {goal}{unit}", "yes" if value <= goal else "NO"


def at_least(name: str, value: float, goal: float) -> Row:
    """A row whose goal is a lower bound."""
    return name, f"{value:.3f}x", f">= {goal}x", "yes" if value >= goal else "NO"


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
    peaks = [[peak_memory(loops) for _ in range(3)] for loops in (2, 12)]
    growth = statistics.median(peaks[1]) / statistics.median(peaks[0])
    # Keeping the patterns of ten more loops would add a third; what is left is the allocator's scatter.
    yield at_most("peak memory of mask_attention, S=12 / S=2", growth, 1.05)


def peak_memory(n_loops: int) -> float:
    """ru_maxrss of a process of its own that measures at `n_loops`."""
    code = f"from analysis.bench import measure_once; measure_once({n_loops})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_once(n_loops: int) -> None:
    """Run mask_attention once and print the process's peak memory."""
    cfg = shape(128, 4, 256, loops=12)
    tokens = torch.randint(0, cfg.d_vocab - 1, (16, 256), generator=torch.Generator().manual_seed(0))
    b = mask_tokens(tokens, cfg.mask_token_id, mask_ratio=0.5)
    mask_attention(HookedLoopMDM(cfg), b, n_loops=n_loops, batch_size=16)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def importing() -> Iterator[Row]:
    """What `import loopmdm_model` adds to `import torch`, in seconds of a process of its own."""
    code = "import time, torch; t = time.perf_counter(); import loopmdm_model; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    yield at_most("import loopmdm_model beyond torch", statistics.median(times), 0.5, " s")


def training() -> Iterator[Row]:
    """Training steps with compiled blocks against eager ones (throughput)."""
    cfg = shape(256, 6, 128, loops=4)
    eager, compiled = LoopMDM(cfg), LoopMDM(cfg)
    if not compile_blocks(compiled):
        yield "training with compiled blocks, / eager", "no compiler", ">= 1.25x", "NO"
        return
    clean = torch.randint(0, cfg.d_vocab - 1, (8, 128), generator=torch.Generator().manual_seed(0))
    b = draw_masks(clean, cfg.mask_token_id, torch.ones_like(clean, dtype=torch.bool), 0, 0)

    def step(model: LoopMDM) -> None:
        masked_cross_entropy(model(b.tokens, n_loops=3), b).mean().backward()
        model.zero_grad()

    yield at_least(
        "training with compiled blocks, / eager",
        1 / ratio(lambda: step(compiled), lambda: step(eager), 15),
        1.25,
    )


def sampling() -> Iterator[Row]:
    """Ancestral sampling, one sequence of 128 tokens in 32 steps, against the textbook sampler."""
    for vocab, goal in ((50_258, 3.0), (2_048, None)):
        model = LoopMDM(shape(512, 8, 128, vocab=vocab, heads=8)).eval()
        seeds = itertools.count()
        value = 1 / ratio(
            lambda model=model, seeds=seeds: sample(model, 1, 128, 32, n_loops=1, seed=next(seeds)),
            lambda model=model, seeds=seeds: textbook_sample(model, 1, 128, 32, n_loops=1, seed=next(seeds)),
            5,
        )
        name = f"sampling speed, V={vocab:,} d=512 8 layers L=128 32 steps, / textbook"
        yield at_least(name, value, goal) if goal else (name, f"{value:.3f}x", "-", "yes")


def spread() -> Iterator[Row]:
    """Scatter of the NELBO estimators at equal forwards on a shipped model, and bias on toys."""
    model = LoopMDM.from_pretrained("sotu-loop")
    tokens = _text(model, 32)
    deviation = {}
    for estimator in get_args(Estimator):
        means = [nelbo(model, tokens, n_samples=1, seed=s, estimator=estimator).mean for s in range(200)]
        deviation[estimator] = statistics.stdev(means)
    against = deviation["stratified-t"]
    yield at_most("NELBO std, exact counts / stratified t (200 repeats)", deviation["exact-count"] / against, 0.7)
    independent = deviation["independent-t"] / against
    yield "NELBO std, independent t / stratified t", f"{independent:.3f}x", "-", "yes"
    for length in (2, 4, 8, 12):
        torch.manual_seed(length)
        toy = LoopMDM(dataclasses.replace(shape(16, 4, 16, loops=3, vocab=23), initializer_range=0.4)).eval()
        sequence = torch.randint(0, 22, (length,))
        means = [nelbo(toy, sequence.expand(32, -1), 2, n_samples=4, seed=s).mean for s in range(200)]
        error = statistics.stdev(means) / len(means) ** 0.5
        bias = abs(statistics.mean(means) - enumerated_nelbo(toy, sequence, 2)) / error
        yield at_most(f"NELBO |bias| against enumeration, L={length}", bias, 2.0, " s.e.")


def adaptive() -> Iterator[Row]:
    """Time saved by stopping sequences, as a share of the FLOPs saved, at batch 32.

    A plan on an untrained model of middle size, and StateDelta on a shipped one, where sequences differ.
    """
    cfg = shape(256, 6, 128, loops=12)
    clean = torch.randint(0, cfg.d_vocab - 1, (32, 128), generator=torch.Generator().manual_seed(0))
    yield _saved("NoiseSchedule, d=256", LoopMDM(cfg).eval(), clean, NoiseSchedule(loops=tuple(range(1, 13))))
    shipped = LoopMDM.from_pretrained("sotu-loop")
    yield _saved("StateDelta, sotu-loop", shipped, _text(shipped, 32), None)


def _text(model: LoopMDM, n: int) -> Tensor:
    tokenizer = load_tokenizer(resolve("sotu-loop") / TOKENIZER, model.cfg.d_vocab)
    return rows_of(load_test_set("sotu", model.cfg.n_ctx, tokenizer).tokens, n)


def _saved(name: str, model: LoopMDM, clean: Tensor, rule: StoppingRule | None) -> Row:
    tokens = mask_tokens(clean, model.cfg.mask_token_id, t=torch.linspace(0.02, 0.98, len(clean))).tokens
    with torch.inference_mode():
        chosen = _halfway(model, tokens) if rule is None else rule
        full, less = model.run(tokens, n_loops=12), model.run(tokens, stop=chosen)
        saved = 1 - float(less.flops.sum() / full.flops.sum())
        time_ratio = ratio(lambda: model.run(tokens, stop=chosen), lambda: model.run(tokens, n_loops=12), 15)
    counts = f"{int(less.loops_used.min())}-{int(less.loops_used.max())} loops, {saved:.0%} of FLOPs saved"
    return at_least(f"{name}, batch 32, {counts}: time saved / FLOPs saved", (1 - time_ratio) / saved, 0.85)


def _halfway(model: LoopMDM, tokens: Tensor) -> StateDelta:
    """The rule under which half of the loops are run."""
    with torch.inference_mode():
        record = model.run(tokens, stop=StateDelta(0.0, max_loops=12)).criterion
    thresholds = record[record.isfinite()].sort().values.tolist()
    rules = [StateDelta(value, max_loops=12) for value in thresholds]
    return min(rules, key=lambda rule: abs(float(rule.replay(record).float().mean()) - 6))


def all_loops() -> Iterator[Row]:
    """NELBO at every S = 1..12 against one trajectory of 12 loops and 12 codas."""
    cfg = shape(256, 6, 128, loops=12)
    model = LoopMDM(cfg).eval()
    clean = torch.randint(0, cfg.d_vocab - 1, (32, 128), generator=torch.Generator().manual_seed(0))
    b = draw_masks(clean, cfg.mask_token_id, torch.ones_like(clean, dtype=torch.bool), 0, 0)

    def trajectory() -> None:
        for state, context in model.states(b.tokens, 12):
            model.readout(state, context, rows=b.masked)

    with torch.inference_mode():
        value = ratio(lambda: nelbo_by_loop(model, clean, 12, n_samples=1), trajectory, 7)
    yield at_most("NELBO at S = 1..12, / one trajectory and 12 codas", value, 1.1)


BENCHMARKS = {
    "forward": forward,
    "caching": caching,
    "masses": masses,
    "import": importing,
    "training": training,
    "sampling": sampling,
    "spread": spread,
    "adaptive": adaptive,
    "all-loops": all_loops,
}


def run(names: list[str] | None = None) -> list[Row]:
    """All rows of the named benchmarks: (benchmark, measured, goal, met)."""
    for name in names or []:
        if name not in BENCHMARKS:
            raise unknown_name("benchmark", name, BENCHMARKS)
    return [row for name in names or BENCHMARKS for row in BENCHMARKS[name]()]
