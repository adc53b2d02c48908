"""Loops or denoising steps? The same FLOPs can buy deep forwards or many of them.

Two questions are kept apart. The marginal NLL (the NELBO at S) asks how well single hidden tokens are predicted;
it cannot see denoising steps. Joint coherence asks whether tokens drawn together fit: boards that are solved, or
a judge's nats, beside the diversity of what was written. Definitions are ours.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from loopmdm.analysis.measures.stopping.quality import Judge, Quality, Samples
from loopmdm.analysis.numbers import stats
from loopmdm.model import flops
from loopmdm.model.diffusion.likelihood import Read, estimates_after
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.sudoku import Board

MARGINAL = "marginal-nll"
COLUMNS = ["budget", "n_loops", "steps", "order", "temperature", "measure", "quality", "quality_se",
           "against_first", "against_first_se", "flops", "n", "n_units"]  # fmt: skip
Pair = tuple[float, int, int]
"""Budget (FLOPs a sequence; NaN: none given), n_loops, steps."""


def equal_flops_pairs(
    cfg: LoopMDMConfig, length: int, budgets: Sequence[float], n_loops: Sequence[int], most_steps: int
) -> list[Pair]:
    """For every budget and S the most denoising steps it pays for; left out where it pays for none.

    A forward is taken to read half of the positions. More steps than `most_steps`, the positions to fill, cannot
    be used: such an S is left out, as it would spend less than the others.
    """
    pairs = []
    for budget in budgets:
        for count in n_loops:
            cost = (cfg.n_prelude_layers + count * cfg.n_loop_layers) * cfg.layer_flops(length)
            steps = int(budget // (cost + flops.readout_flops(cfg, length, length / 2)))
            if 1 <= steps <= most_steps:
                pairs.append((float(budget), count, steps))
    if not pairs:
        raise UsageError(f"no number of steps in 1..{most_steps} fits these budgets; give others, or grid=")
    return pairs


def loops_against_steps(
    m: LoopedModel,
    grid: Sequence[tuple[int, int]] | None = None,
    budgets: Sequence[float] = (),
    n_loops: Sequence[int] = (1, 2, 4),
    n: int | None = None,
    clues: MaskedBatch | None = None,
    board: Board | None = None,
    judge: Judge | None = None,
    test: Tensor | Sequences | None = None,
    maskable: Tensor | None = None,
    order: str | None = None,
    temperature: float | None = None,
    n_samples: int = 2,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Sample at pairs (n_loops, steps) of `grid`, or at those of equal FLOPs for each of `budgets`.

    A row per pair and measure: those of `sample_quality`, and with clean `test` sequences "marginal-nll", which is
    that of S whatever the steps. `against_first` is quality less that of the budget's first pair, paired by
    sequence (same seeds; without budgets: of the first pair); `flops` are those spent, of one sequence. `clusters`
    name the documents of `test`. Sudoku: "confidence" order at temperature 0 by default, else "random" at 1.
    Columns: budget n_loops steps order temperature measure quality quality_se against_first against_first_se
    flops n n_units.
    """
    if (grid is None) == (not budgets):
        raise UsageError("give either grid=, pairs (n_loops, steps), or budgets= in FLOPs per sequence")
    samples = Samples.of(
        board, order, temperature, n=n, clues=clues, judge=judge, seed=seed, batch_size=batch_size
    )
    length = m.cfg.n_ctx if clues is None else clues.tokens.shape[1]
    free = length if clues is None else int(clues.masked.sum(-1).max())
    if grid is None:
        pairs = equal_flops_pairs(m.cfg, length, budgets, n_loops, free)
    else:
        pairs = [(float("nan"), check_count("n_loops", s), check_count("steps", k)) for s, k in grid]
    marginal = {}
    if test is not None:
        unseen = Sequences.of(test, maskable, clusters=clusters).clean_for(m)
        marginal = _marginal(m, unseen, {s for _, s, _ in pairs}, Read(n_samples=n_samples, seed=seed))
        clusters = unseen.clusters
    rows, first = [], {}
    for budget, count, steps in pairs:
        r = samples.draw(m, steps, n_loops=count)
        for own in samples.quality(r) + ([marginal[count]] if marginal else []):
            owner = clusters if own.measure == MARGINAL else None
            other = first.setdefault((str(budget), own.measure), own)
            mean, error, number = own.mean(owner)
            drawn = (len(r.loops_used), samples.order, samples.temperature)
            gained = (*own.against(other, owner), r.flops / len(r.tokens), number)
            units = stats.count_units(number, owner)
            rows.append((budget, count, *drawn, own.measure, mean, error, *gained, units))
    return pd.DataFrame(rows, columns=COLUMNS)


def _marginal(m: LoopedModel, test: Sequences, counts: set[int], read: Read) -> dict[int, Quality]:
    results = estimates_after(m, test, sorted(counts), read)
    return {
        count: Quality(MARGINAL, result.per_sequence.numpy(), result.lengths.double().numpy())
        for count, result in zip(sorted(counts), results, strict=True)
    }
