"""Sampling and likelihood: speed, scatter and bias, stopping early, all loop counts at once."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor

from loopmdm.model.corpora.tokenizer import load_tokenizer
from loopmdm.model.diffusion.likelihood import Estimator, masked_draw, nelbo, nelbo_by_loop
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.masking import mask_tokens
from loopmdm.model.network.checkpoints import TOKENIZER, resolve
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import Sequences
from loopmdm.model.stopping.rules import NoiseSchedule, StateDelta, StoppingRule
from loopmdm.model.tasks.batches import spread as rows_of
from loopmdm.model.tasks.test_sets import load_test_set
from tests.bench.common import Row, at_least, at_most, ratio, shape
from tests.textbook import enumerated_nelbo, textbook_sample


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
    b = masked_draw(Sequences.of(clean), cfg.mask_token_id, 0, 0)

    def trajectory() -> None:
        for state, context in model.states(b.tokens, 12):
            model.readout(state, context, rows=b.masked)

    with torch.inference_mode():
        value = ratio(lambda: nelbo_by_loop(model, clean, 12, n_samples=1), trajectory, 7)
    yield at_most("NELBO at S = 1..12, / one trajectory and 12 codas", value, 1.1)
