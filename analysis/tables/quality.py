"""Tables of what the shipped models can do, by number of loops: every arm and seed, then one pair in detail."""

import numpy as np
import pandas as pd

from analysis import zoo
from analysis.evaluations import evaluate
from loopmdm_model import stats
from loopmdm_model.data.puzzles import puzzles
from loopmdm_model.data.sudoku import BOARDS
from loopmdm_model.evaluation import solve_one_shot, task_of
from loopmdm_model.flops import flops_per_token
from loopmdm_model.likelihood import nelbo_by_loop

READ_TO = 3
CLUES, N_PUZZLES = (20, 16), 500


def read_to(model: zoo.Shipped, max_loops: int) -> int:
    """Loops a model is read to: 3 x S_max, also for base models; others that were not looped only at S = 1."""
    return READ_TO * zoo.s_max(model.name) if max_loops > 1 or model.arm == "base" else 1


def nll_table() -> pd.DataFrame:
    """Test NELBO by S of every shipped model, one mask a sequence.

    Differences are paired by sequence and mask: `change_from_s1` from the model's own S = 1,
    `change_from_base` from the base model of the same task and seed at S = 1 (NaN if there is none).
    """
    rows, base = [], {}
    for model in zoo.shipped():
        m, test = zoo.opened(model.name)
        loops = read_to(model, m.cfg.max_loops)
        results = nelbo_by_loop(m.model, test.tokens, loops, n_samples=1, maskable=test.maskable)
        values = np.stack([result.per_sequence.numpy() for result in results], axis=1)
        if model.arm == "base":  # sorts before all other arms
            base[model.task, model.seed] = values[:, :1]
        twin = base.get((model.task, model.seed), np.full_like(values[:, :1], np.nan))
        frame = pd.DataFrame({"n_loops": np.arange(1, loops + 1)})
        for name, change in (("nll", values), ("change_from_s1", values - values[:, :1]),
                             ("change_from_base", values - twin)):  # fmt: skip
            frame[name], frame[f"{name}_se"], _ = stats.mean_and_error(change, test.clusters)
        frame["n"] = len(values)
        frame["n_clusters"] = len(values) if test.clusters is None else len(np.unique(test.clusters))
        frame["flops_per_token"] = [flops_per_token(m.cfg, m.cfg.n_ctx, s) for s in frame["n_loops"]]
        rows.append(frame.assign(**label(model), max_loops=m.cfg.max_loops, s_max=zoo.s_max(model.name)))
    return pd.concat(rows, ignore_index=True)


def solve_rate_table() -> pd.DataFrame:
    """One-shot solve rate of 6x6 Sudoku by S and clue count, every shipped Sudoku model."""
    rows = []
    for model in zoo.shipped("sudoku"):
        m, test = zoo.opened(model.name)
        board, limit = BOARDS[test.task], read_to(model, m.cfg.max_loops)
        for clues in CLUES:
            b = puzzles(board, test.tokens[:N_PUZZLES], clues)
            for n_loops, outcome in enumerate(solve_one_shot(m.model, board, b, limit), start=1):
                low, high = stats.wilson(int(outcome.sum()), len(outcome))
                row = label(model) | {"n_clues": clues, "n_loops": n_loops, "s_max": zoo.s_max(model.name)}
                row |= {"solve_rate": float(outcome.float().mean()), "low": low, "high": high, "n": len(outcome)}
                rows.append(row)
    return pd.DataFrame(rows)


def label(model: zoo.Shipped) -> dict:
    """The columns that say which model a row is of."""
    return {"model": model.name, "task": model.task, "arm": model.arm, "seed": model.seed}


def evaluated(measure: str, models: tuple[str, ...], counts: tuple[int, ...] = (), **options) -> pd.DataFrame:
    """One measure of `analysis.evaluations` for several models, at `counts` or at 1, 2, S_max, 2 and 3 x S_max."""
    frames = []
    for name in models:
        most = zoo.s_max(name)
        loops = counts or (1, 2, most, 2 * most, 3 * most)
        frames.append(evaluate(name, measure, list(loops), **options))
    return pd.concat(frames, ignore_index=True)


def generative_table() -> pd.DataFrame:
    """Generative perplexity beside diversity; the base model only as it was trained, at S = 1."""
    base = evaluated("generative", ("sotu-base",), counts=(1,))
    return pd.concat([base, evaluated("generative", ("sotu-loop",), counts=(1, 2, 6, 12))], ignore_index=True)


def references_table() -> pd.DataFrame:
    """Unigram and bigram test NLL (nats per token) on the blocks that the text models are tested on."""
    records = [zoo.record(name) for name in ("sotu-base", "sotu-loop")]
    rows = [
        (task_of(record), kind, record["evaluation"][f"{kind}_nll"], record["evaluation"][f"{kind}_nll_se"])
        for record in records
        for kind in ("unigram", "bigram")
    ]
    return pd.DataFrame(rows, columns=["task", "reference", "nll", "standard_error"]).drop_duplicates()
