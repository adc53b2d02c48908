"""Tables of what the shipped models can do, by number of loops: every arm and seed, then one pair in detail."""

from functools import partial

import numpy as np
import pandas as pd

from analysis import zoo
from analysis.decomposition import by_noise_level
from analysis.evaluations import cached, evaluate
from analysis.evaluations.subject import at
from analysis.tables import science
from analysis.tables.science import AT_CHANCE, READ_TO
from loopmdm_model import stats
from loopmdm_model.checkpoints import CONFIG, resolve
from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.data.puzzles import puzzles
from loopmdm_model.data.sudoku import BOARDS
from loopmdm_model.evaluation import solve_one_shot, task_of
from loopmdm_model.flops import flops_per_token
from loopmdm_model.likelihood import draw_counts, nelbo_by_loop

SEED = 0
N_PUZZLES = 500
CLUES = {"sudoku": 20, "sudoku9": 60}
"""Cells that are given: 5 ninths of a 6x6 grid, about 3 quarters of a 9x9 one."""


def read_at(model: zoo.Shipped) -> list[int]:
    """Loop counts a model is read at: 1 to S_max + 2, then every second one to 3 x S_max, and twice S_max.

    Base models are read to S_max, others that were not looped at S = 1 only. Of a task that nobody learned, looped
    models are read to S_max and all others at S = 1.
    """
    most = zoo.s_max(model.name)
    looped = LoopMDMConfig.load(resolve(model.name) / CONFIG).max_loops > 1
    if model.task in AT_CHANCE:
        return list(range(1, most + 1)) if looped else [1]
    if looped:
        near, far = range(1, most + 3), range(READ_TO * most, most + 2, -2)
        return sorted({*near, *far, 2 * most})
    return list(range(1, most + 1)) if model.arm == "base" else [1]


def nll_table() -> pd.DataFrame:
    """Test NELBO by S of every shipped model, one mask a sequence.

    Differences are paired by sequence and mask: `change_from_s1` from the model's own S = 1,
    `change_from_base` from the base model of the same task and seed at S = 1 (NaN if there is none).
    """
    rows, base = [], {}
    for model in zoo.shipped():
        cfg = LoopMDMConfig.load(resolve(model.name) / CONFIG)
        counts = read_at(model)
        values, clusters = _sequence_nll(model, counts)
        if model.arm == "base":  # sorts before all other arms
            base[model.task, model.seed] = values[:, :1]
        twin = base.get((model.task, model.seed), np.full_like(values[:, :1], np.nan))
        frame = pd.DataFrame({"n_loops": counts})
        for name, change in (("nll", values), ("change_from_s1", values - values[:, :1]),
                             ("change_from_base", values - twin)):  # fmt: skip
            frame[name], frame[f"{name}_se"], _ = stats.mean_and_error(change, clusters)
        frame["n"] = len(values)
        frame["n_units"] = stats.count_units(len(values), clusters)
        frame["flops_per_token"] = [flops_per_token(cfg, cfg.n_ctx, s) for s in frame["n_loops"]]
        rows.append(frame.assign(**label(model), max_loops=cfg.max_loops, s_max=zoo.s_max(model.name)))
    return pd.concat(rows, ignore_index=True)


def noise_level_table() -> pd.DataFrame:
    """NELBO and gain over S = 1 by mask ratio, two main tasks, every seed; values and masks are `nll_table`'s."""
    frames, names = [], science.main_tasks("loop")
    for model in zoo.shipped(None, "loop"):
        if model.name not in names:
            continue
        most, counts = zoo.s_max(model.name), read_at(model)
        values, clusters = _sequence_nll(model, counts)
        lengths = zoo.opened(model.name)[1].n_maskable
        masked = draw_counts(lengths, SEED, draw=0)
        frame = at(by_noise_level(values.T, counts, masked, lengths, clusters=clusters),
                   [1, 2, *(most * times for times in range(1, READ_TO + 1))])  # fmt: skip
        frame.insert(0, "model", model.name)
        frames.append(frame.assign(n_units=stats.count_units(len(values), clusters)))
    return pd.concat(frames, ignore_index=True)


def measure_by_loops(name: str) -> None:
    """Measure what the tables over seeds need of one run, so that it is cached."""
    for model in zoo.shipped():
        if model.name == name:
            counts = read_at(model)
            _sequence_nll(model, counts)
            if model.task in CLUES:
                _solve_rates(model, counts[-1])
            if model.task == "gsm":
                _word_problems(model)


def _sequence_nll(model: zoo.Shipped, counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """NELBO of each test sequence at some S [sequence, count], and which share a document."""

    def compute() -> pd.DataFrame:
        m, test = zoo.opened(model.name)
        results = nelbo_by_loop(m.model, test.tokens, counts, n_samples=1, maskable=test.maskable, seed=SEED)
        owner = np.arange(len(test.tokens)) if test.clusters is None else test.clusters
        columns = {str(count): result.per_sequence.numpy() for count, result in zip(counts, results, strict=True)}
        return pd.DataFrame(columns | {"cluster": owner})

    frame = cached(model.name, ["test NELBO by sequence, 1 mask", counts], compute)
    return frame.drop(columns="cluster").to_numpy(), frame["cluster"].to_numpy()


def solve_rate_table() -> pd.DataFrame:
    """One-shot solve rate of Sudoku by S, every shipped Sudoku model."""
    tables = []
    for model in (model for task in CLUES for model in zoo.shipped(task)):
        tables.append(_solve_rates(model, read_at(model)[-1]).assign(**label(model), s_max=zoo.s_max(model.name)))
    return pd.concat(tables, ignore_index=True)


def _solve_rates(model: zoo.Shipped, loops: int) -> pd.DataFrame:
    clues = CLUES[model.task]
    compute = partial(_one_shot, model.name, loops, clues)
    return cached(model.name, ["one-shot by S", loops, clues, N_PUZZLES], compute)


def _one_shot(name: str, loops: int, clues: int) -> pd.DataFrame:
    m, test = zoo.opened(name)
    board, rows = BOARDS[test.task], []
    b = puzzles(board, test.tokens[:N_PUZZLES], clues)
    for n_loops, outcome in enumerate(solve_one_shot(m.model, board, b, loops), start=1):
        low, high = stats.wilson(int(outcome.sum()), len(outcome))
        rows.append((clues, n_loops, float(outcome.float().mean()), low, high, len(outcome)))
    return pd.DataFrame(rows, columns=["n_clues", "n_loops", "solve_rate", "low", "high", "n"])


def label(model: zoo.Shipped) -> dict:
    """The columns that say which model a row is of."""
    return {"model": model.name, "task": model.task, "arm": model.arm, "seed": model.seed}


def excess_kl_table() -> pd.DataFrame:
    """KL from the exact posterior by hops at every S up to 2 x S_max; base models at S = 1."""
    frames = []
    for model in (*zoo.shipped("tree"), *zoo.shipped("markov")):
        most = 1 if model.arm == "base" else 2 * zoo.s_max(model.name)
        frame = evaluate(model.name, "excess-kl", list(range(1, most + 1)))
        frames.append(frame.assign(**label(model)))
    return pd.concat(frames, ignore_index=True)


def text_table(measure: str) -> pd.DataFrame:
    """One measure of sotu-base as it was trained, at S = 1, and of sotu-loop at 1, S_max and twice S_max."""
    most = zoo.s_max("sotu-loop")
    asked = (("sotu-base", [1]), ("sotu-loop", [1, most, 2 * most]))
    return pd.concat([evaluate(name, measure, counts) for name, counts in asked], ignore_index=True)


WORD_PROBLEMS = {"steps": 16, "n": 50}


def word_problems_table() -> pd.DataFrame:
    """Accuracy on word problems by S, unseen templates and real GSM8K items; others than looped ones at S = 1."""
    return pd.concat([_word_problems(model) for model in zoo.shipped("gsm")], ignore_index=True)


def _word_problems(model: zoo.Shipped) -> pd.DataFrame:
    most = zoo.s_max(model.name)
    counts = [1, most] if model.arm == "loop" else [1]
    frame = evaluate(model.name, "word-problems", counts, **WORD_PROBLEMS).rename(columns={"task": "problems"})
    return frame.drop(columns="model").assign(**label(model), s_max=most)


def references_table() -> pd.DataFrame:
    """Unigram and bigram test NLL (nats per token) on the blocks that the text models are tested on."""
    records = [zoo.record(name) for name in ("sotu-base", "sotu-loop")]
    rows = [
        (task_of(record), kind, record["evaluation"][f"{kind}_nll"], record["evaluation"][f"{kind}_nll_se"])
        for record in records
        for kind in ("unigram", "bigram")
    ]
    return pd.DataFrame(rows, columns=["task", "reference", "nll", "standard_error"]).drop_duplicates()
