"""Stopping rules in whole sampling runs: what is written, what it costs, how long it takes, where the loops go.

A sampler's later inputs depend on its earlier answers, so nothing can be replayed: every rule samples, with the
seeds of the others. Time is compared within repeats, rule and full loops by turns, and told as a ratio.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.analysis.measures.stopping.quality import Judge, Samples
from loopmdm.analysis.measures.stopping.record import rule_name
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.sampling import SampleLoop, SampleResult, sample
from loopmdm.model.errors import check_count
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.stopping.rules import FixedLoops, StoppingRule
from loopmdm.model.tasks.sudoku import Board

COLUMNS = ["rule", "threshold", "max_loops", "steps", "order", "temperature", "measure", "quality", "quality_se",
           "against_full", "against_full_se", "flops", "mean_loops", "time_ratio", "n"]  # fmt: skip


def stopping_in_sampling(
    m: LoopedModel,
    rules: Sequence[StoppingRule],
    n: int | None = None,
    steps: int = 64,
    clues: MaskedBatch | None = None,
    board: Board | None = None,
    judge: Judge | None = None,
    order: str | None = None,
    temperature: float | None = None,
    max_loops: int | None = None,
    repeats: int = 3,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Sample with every rule of any scope, beside "fixed" at `max_loops` (default S_max), which comes first.

    `FixedLoops` and `NoiseSchedule` are rules like others: give them as controls. With `board` (and the puzzles as
    `clues`) the order is "confidence" at temperature 0 by default, else "random" at 1. A row per rule and measure
    of `sample_quality`; `against_full` is quality less that of the full loops, paired by sequence; `flops` are of
    one sequence, `mean_loops` of a forward, `time_ratio` the median over `repeats` (at least 1) of time by that of
    full loops in the same repeat.
    Columns: rule threshold max_loops steps order temperature measure quality quality_se against_full
    against_full_se flops mean_loops time_ratio n; for "fixed" the threshold is NaN.
    """
    check_count("repeats", repeats)
    full = FixedLoops(max_loops=check_count("max_loops", m.cfg.max_loops if max_loops is None else max_loops))
    samples = Samples.of(
        board, order, temperature, n=n, clues=clues, judge=judge, seed=seed, batch_size=batch_size
    )
    runs = [lambda rule=rule: samples.draw(m, steps, stop=rule) for rule in (full, *rules)]
    results, ratios = _by_turns(runs, repeats)
    reference = samples.quality(results[0])
    rows = []
    for rule, r, ratio in zip((full, *rules), results, ratios, strict=True):
        threshold = float("nan") if isinstance(rule, FixedLoops) else float(rule.threshold)
        used = r.loops_used[r.loops_used > 0].double()
        found = reference if r is results[0] else samples.quality(r)
        for own, other in zip(found, reference, strict=True):
            mean, error, count = own.mean(clusters)
            rows.append((
                rule_name(rule), threshold, rule.max_loops, len(r.loops_used), samples.order, samples.temperature,
                own.measure,
                mean, error, *own.against(other, clusters), r.flops / len(r.tokens),
                float(used.mean()) if len(used) else float("nan"), ratio, count,
            ))  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _by_turns(runs: list[Callable[[], SampleResult]], repeats: int) -> tuple[list[SampleResult], list[float]]:
    """Results of all, and the median over repeats of each one's time by the first's, run forth and back."""
    results: dict[int, SampleResult] = {}
    seconds = np.zeros((repeats, len(runs)))
    for repeat in range(repeats):
        places = range(len(runs))
        for place in places if repeat % 2 == 0 else reversed(places):
            start = time.perf_counter()
            results[place] = runs[place]()
            seconds[repeat, place] = time.perf_counter() - start
    ratios = [statistics.median(column) for column in (seconds / seconds[:, :1]).T.tolist()]
    return [results[place] for place in range(len(runs))], ratios


class _HeldTokens:
    """Callback: loops of each hidden token, summed by (step, sequence); with scope "sequence" those of all."""

    def __init__(self) -> None:
        self.loops: dict[int, dict[int, float]] = {}

    def __call__(self, seen: SampleLoop) -> None:
        moving = seen.view.masked if seen.view.held is None else seen.view.masked & ~seen.view.held
        shares = moving.sum(-1).double() / seen.view.masked.sum(-1)
        at = self.loops.setdefault(seen.step, {})
        for sequence, share in zip(seen.sequences.tolist(), shares.tolist(), strict=True):
            at[sequence] = at.get(sequence, 0.0) + share


def usage_by_step(
    m: LoopedModel,
    rule: StoppingRule,
    n: int | None = None,
    steps: int = 64,
    clues: MaskedBatch | None = None,
    order: str = "random",
    temperature: float = 1.0,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Loops used at each denoising step of a sampling run under `rule`, of either scope.

    `value` is the mean over the sequences that ran a forward at the step of the loops that their hidden tokens
    got on average (with scope "sequence": of their loops); `mask_ratio` the mean share of free positions still
    hidden before it. Columns: rule threshold max_loops scope step mask_ratio value standard_error n; a step
    without a forward is NaN with n = 0.
    """
    seen = _HeldTokens()
    r = sample(
        m, n, steps=steps, stop=rule, clues=clues, order=order, temperature=temperature, seed=seed,
        batch_size=batch_size, callback=seen,
    )  # fmt: skip
    hidden = _hidden_share(r, m.cfg.mask_token_id)
    rows = []
    for step in range(len(r.loops_used)):
        loops = np.full(len(r.tokens), np.nan)
        for sequence, value in seen.loops.get(step, {}).items():
            loops[sequence] = value
        share, _, _ = stats.mean_and_error(np.where(np.isfinite(loops), hidden[step], np.nan))
        value, error, count = stats.mean_and_error(loops, clusters)
        rows.append((rule_name(rule), float(rule.threshold), rule.max_loops, rule.scope, step, float(share),
                     float(value), float(error), int(count)))  # fmt: skip
    columns = ["rule", "threshold", "max_loops", "scope", "step", "mask_ratio", "value", "standard_error", "n"]
    return pd.DataFrame(rows, columns=columns)


def _hidden_share(r: SampleResult, mask_token_id: int) -> np.ndarray:
    """Share of each sequence's free positions that are hidden before each step, [step, n]."""
    tokens: Int[Tensor, "n pos"] = r.start.clone()
    free = (r.start == mask_token_id).sum(-1).clamp(min=1).double()
    shares = []
    for step in range(len(r.loops_used)):
        shares.append((tokens == mask_token_id).sum(-1).double() / free)
        _, row, position, token = r.events[r.events[:, 0] == step].T
        tokens[row, position] = token
    return torch.stack(shares).cpu().numpy() if shares else np.zeros((0, len(r.tokens)))
