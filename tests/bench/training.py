"""Training: throughput against the machine's matrix products, data loading, resuming."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from loopmdm.model.diffusion.likelihood import masked_cross_entropy, masked_draw
from loopmdm.model.flops import training_flops
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import Sequences
from loopmdm.model.taps import explicit_taps, no_taps
from loopmdm.model.tasks.batches import dataset
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.training.trainer import Trainer, compile_blocks, matmul_precision
from tests.bench.common import Row, at_least, at_most, ratio, shape


def faster() -> Iterator[Row]:
    """Training steps as the shipped specs run them, and with compiled blocks, against eager float32 ones."""
    cfg = shape(256, 6, 128, loops=4)
    eager, compiled = LoopMDM(cfg), LoopMDM(cfg)
    clean = torch.randint(0, cfg.d_vocab - 1, (8, 128), generator=torch.Generator().manual_seed(0))
    b = masked_draw(Sequences.of(clean), cfg.mask_token_id, 0, 0)

    def step(model: LoopMDM, precision: str) -> None:
        with matmul_precision(precision):
            taps = no_taps if precision == "highest" else explicit_taps
            masked_cross_entropy(model(b.tokens, n_loops=3, taps=taps), b).mean().backward()
        model.zero_grad()

    plain = lambda: step(eager, "highest")  # noqa: E731
    gain = 1 / ratio(lambda: step(eager, "medium"), plain, 15)
    yield at_least("training with bf16 inputs of products (the shipped specs), / eager float32", gain, 1.25)
    if not compile_blocks(compiled):
        yield "training with compiled blocks, / eager float32", "no compiler", "-", "yes"
        return
    gain = 1 / ratio(lambda: step(compiled, "highest"), plain, 15)
    yield "training with compiled blocks, / eager float32", f"{gain:.3f}x", "-", "yes"


def throughput() -> Iterator[Row]:
    """FLOP/s of whole training steps at d = 256, as a share of large float32 products measured in between.

    As the shipped specs run them, and in plain float32.
    """
    cfg = shape(256, 6, 128, loops=4)
    model, batch = LoopMDM(cfg), 16
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clean = torch.randint(0, cfg.d_vocab - 1, (batch, 128), generator=torch.Generator().manual_seed(0))
    b = masked_draw(Sequences.of(clean), cfg.mask_token_id, 0, 0)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    cost = training_flops(cfg, 128, 3, batch=batch)
    products = max(1, round(cost / (2 * 1024**3)))

    def step(precision: str) -> None:
        with matmul_precision(precision):
            taps = no_taps if precision == "highest" else explicit_taps
            masked_cross_entropy(model(b.tokens, n_loops=3, taps=taps), b).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def sgemm() -> None:
        for _ in range(products):
            torch.mm(left, right)

    def share(precision: str) -> float:
        return ratio(sgemm, lambda: step(precision), 15) * cost / (products * 2 * 1024**3)

    yield at_least("training steps at d=256 as the specs run them: FLOP/s, / sgemm", share("medium"), 0.85)
    yield "the same in plain float32: FLOP/s, / sgemm", f"{share('highest'):.3f}x", "-", "yes"


SUDOKU = """
name = "bench"
seed = 0
data = {corpus = "sudoku6"}
model = {d_model = 128, n_heads = 4, max_loops = 6}
training = {steps = 40, batch_size = 32, curve_points = 1, curve_sequences = 8}
"""


def loading() -> Iterator[Row]:
    """Drawing a step's batch and masks, as a share of the whole step, on a text and a task."""
    for corpus, length, size in (("sotu-slice", 64, 16), ("sudoku6", 36, 32)):
        data = dataset(corpus, length, 1024, 0)
        d_vocab = data.tokenizer.get_vocab_size()
        cfg = shape(128, 3, data.length, loops=6, vocab=d_vocab)
        model = LoopMDM(cfg)
        numbers = iter(range(10**9))

        def load(data=data, size=size, cfg=cfg, numbers=numbers):
            step = next(numbers)
            tokens = data.batch(step, size)
            return masked_draw(Sequences.of(tokens, data.maskable(tokens)), cfg.mask_token_id, 0, step)

        def step(model=model, load=load) -> None:
            b = load()
            masked_cross_entropy(model(b.tokens, n_loops=3), b).mean().backward()
            model.zero_grad()

        yield at_most(f"drawing a batch of {corpus} at d=128, share of the step", ratio(load, step), 0.02)


def resuming() -> Iterator[Row]:
    """Seconds from a stored state to the next step, in this process."""
    import tomllib

    spec = RunSpec.from_dict(tomllib.loads(SUDOKU))
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(spec, Path(folder) / "run")
        run._checkpoint()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            again = Trainer(spec, Path(folder) / "run", resume=True)
            again._step()
            times.append(time.perf_counter() - start)
    yield at_most("resuming a run, up to its next step", statistics.median(times), 5.0, " s")
