"""Tables of what the shipped models can do, by number of loops: every arm and seed, then one pair in detail."""

import numpy as np
import pandas as pd

from loopmdm.analysis.exhibits.tables.science import AT_CHANCE, CONFIRMING, READ_TO, pooled_by_loop
from loopmdm.analysis.measures import MEASURES, evaluate, question
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.quality.decomposition import by_noise_level
from loopmdm.analysis.measures.quality.likelihoods import at
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.numbers.store import Question, Store
from loopmdm.model.diffusion.likelihood import draw_counts, nelbo_by_loop
from loopmdm.model.flops import flops_per_token
from loopmdm.model.network.checkpoints import CONFIG, resolve
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import solve_one_shot, task_of
from loopmdm.model.zoo.runs import Run, Select, Zoo, select

SEED = 0
N_PUZZLES = 500
CLUES = {"sudoku": 20, "sudoku9": 60}
"""Cells that are given: 5 ninths of a 6x6 grid, about 3 quarters of a 9x9 one."""

PAIR = select(task="sotu", arm=("base", "loop"), seed=0)
PAIRS = select(task="sotu", arm=("base", "loop"), weights=True)
"""The text models of equal size and training FLOPs: one pair, and all seeds."""
DOCUMENTS = select(task="sotu")
"""Models that were read on few documents, weights or none."""
GSM = select(task="gsm")


def read_at(model: Run, zoo: Zoo) -> list[int]:
    """Loop counts a model is read at: 1 to S_max + 2, then every second one to 3 x S_max, and twice S_max.

    Base models are read to S_max, others that were not looped at S = 1 only. Of a task that nobody learned, looped
    models are read to S_max and all others at S = 1.
    """
    most, looped = zoo.s_max(model), model.s_max > 1
    if model.task == AT_CHANCE:
        return list(range(1, most + 1)) if looped else [1]
    if looped:
        near, far = range(1, most + 3), range(READ_TO * most, most + 2, -2)
        return sorted({*near, *far, 2 * most})
    return list(range(1, most + 1)) if model.arm == "base" else [1]


def nll_table(zoo: Zoo) -> pd.DataFrame:
    """Test NELBO by S of every shipped model, one mask a sequence.

    Differences are paired by sequence and mask: `change_from_s1` from the model's own S = 1,
    `change_from_base` from the base model of the same task and seed at S = 1 (NaN if there is none).
    """
    rows, base = [], {}
    for model in zoo:
        cfg = LoopMDMConfig.load(resolve(model.name) / CONFIG)
        counts = read_at(model, zoo)
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
        rows.append(frame.assign(**label(model), max_loops=cfg.max_loops, s_max=zoo.s_max(model)))
    return pd.concat(rows, ignore_index=True)


def noise_level_table(models: Select, zoo: Zoo) -> pd.DataFrame:
    """NELBO and gain over S = 1 by mask ratio, every seed; values and masks are `nll_table`'s."""
    frames = []
    for model in models.of(zoo):
        most, counts = model.s_max, read_at(model, zoo)
        values, clusters = _sequence_nll(model, counts)
        lengths = Case.of(model.name).test.n_maskable
        masked = draw_counts(lengths, SEED, draw=0)
        frame = at(by_noise_level(values.T, counts, masked, lengths, clusters=clusters),
                   [1, 2, *(most * times for times in range(1, READ_TO + 1))])  # fmt: skip
        frame.insert(0, "model", model.name)
        frames.append(frame.assign(n_units=stats.count_units(len(values), clusters)))
    return pd.concat(frames, ignore_index=True)


def documents_table(zoo: Zoo) -> pd.DataFrame:
    """Test NELBO by S and document of text models, one mask a sequence; `n` sequences are a document's."""
    frames = []
    for model in DOCUMENTS.of(zoo):
        counts = read_at(model, zoo)
        values, owner = _sequence_nll(model, counts)
        frame = pd.DataFrame(values, columns=pd.Index(counts, name="n_loops")).groupby(owner)
        long = frame.mean().rename_axis("document").reset_index().melt("document", value_name="nll")
        long = long.astype({"n_loops": int}).assign(n=long["document"].map(frame.size()))
        frames.append(long.assign(**label(model)))
    return pd.concat(frames, ignore_index=True)


def asked_over_seeds(model: Run, zoo: Zoo) -> list[Question]:
    """What the tables over seeds ask of one run; of those without weights it was asked before they went."""
    counts = read_at(model, zoo)
    asked = [_by_sequence(model, counts)]
    if model.task in CLUES:
        asked.append(_solve_rates(model, counts[-1]))
    return [*asked, _word_problems(model)] if model.task == "gsm" else asked


def asked_besides(model: Run, zoo: Zoo) -> list[Question]:
    """What single tables ask of a run of a declared set, before its weights go, too."""
    return [pooled_by_loop(model, zoo)] if model in CONFIRMING else []


def keep(model: Run, zoo: Zoo) -> None:
    """Answer all that is asked of a run beside its record, before its weights go."""
    for asked in (*asked_over_seeds(model, zoo), *asked_besides(model, zoo)):
        asked.answer(Store.beside(model.name))


def is_kept(model: Run, zoo: Zoo) -> bool:
    """Whether `asked_over_seeds` is answered beside the record of a run.

    What single tables ask besides does not count: without it those cannot be made, and say so; all others can.
    """
    return all(asked.key in Store.beside(model.name) for asked in asked_over_seeds(model, zoo))


def _sequence_nll(model: Run, counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """NELBO of each test sequence at some S [sequence, count], and which share a document."""
    frame = _by_sequence(model, counts).answer()
    return frame.drop(columns="cluster").to_numpy(), frame["cluster"].to_numpy()


def _by_sequence(model: Run, counts: list[int]) -> Question:
    """NELBO of each test sequence, a column an S, and `cluster`."""

    def compute() -> pd.DataFrame:
        case = Case.of(model.name)
        m, test = case.m, case.test
        results = nelbo_by_loop(m, test.tokens, counts, n_samples=1, maskable=test.maskable, seed=SEED)
        owner = np.arange(len(test.tokens)) if test.clusters is None else test.clusters
        columns = {str(count): result.per_sequence.numpy() for count, result in zip(counts, results, strict=True)}
        return pd.DataFrame(columns | {"cluster": owner})

    return Question(model.name, MEASURES["nll"].label, ["by sequence, 1 mask", counts], compute)


def solve_rate_table(models: Select, zoo: Zoo) -> pd.DataFrame:
    """One-shot solve rate of Sudoku by S."""
    tables = []
    for model in models.of(zoo):
        frame = _solve_rates(model, read_at(model, zoo)[-1]).answer()
        tables.append(frame.assign(**label(model), s_max=zoo.s_max(model)))
    return pd.concat(tables, ignore_index=True)


def _solve_rates(model: Run, loops: int) -> Question:
    clues = CLUES[model.task]
    question = ["one-shot by S", loops, clues, N_PUZZLES]
    return Question(
        model.name, MEASURES["solve-rate"].label, question, lambda: _one_shot(model.name, loops, clues)
    )


def _one_shot(name: str, loops: int, clues: int) -> pd.DataFrame:
    case = Case.of(name)
    board, rows = BOARDS[case.test.task], []
    b = puzzles(board, case.test.tokens[:N_PUZZLES], clues)
    for n_loops, outcome in enumerate(solve_one_shot(case.m, board, b, loops), start=1):
        low, high = stats.wilson(int(outcome.sum()), len(outcome))
        rows.append((clues, n_loops, float(outcome.float().mean()), low, high, len(outcome)))
    return pd.DataFrame(rows, columns=["n_clues", "n_loops", "solve_rate", "low", "high", "n"])


def label(model: Run) -> dict:
    """The columns that say which model a row is of."""
    return {"model": model.name, "task": model.task, "arm": model.arm, "seed": model.seed}


def excess_kl_table(models: Select, zoo: Zoo) -> pd.DataFrame:
    """KL from the exact posterior by hops at every S up to 2 x S_max; models that were not looped at S = 1."""
    frames = []
    for model in models.of(zoo):
        most = 2 * model.s_max if model.s_max > 1 else 1
        frame = evaluate(model.name, "excess-kl", list(range(1, most + 1)))
        frames.append(frame.assign(**label(model)))
    return pd.concat(frames, ignore_index=True)


def excess_with_cuts_table(models: Select, zoo: Zoo) -> pd.DataFrame:
    """KL from the exact posterior by hops at S = 1 and S_max, with edges cut from the second loop on."""
    frames = [evaluate(run.name, "excess-kl-cut", [1, run.s_max]).assign(**label(run)) for run in models.of(zoo)]
    return pd.concat(frames, ignore_index=True)


def text_table(measure: str, zoo: Zoo) -> pd.DataFrame:
    """One measure of the text models: base at S = 1, as it was trained, loop at 1 and S_max, seed 0 beyond."""
    frames = []
    for run in PAIRS.of(zoo):
        counts = [1, run.s_max, 2 * run.s_max] if run.s_max > 1 else [1]
        answer = evaluate(run.name, measure, counts if run.seed == 0 else counts[:2])
        frames.append(answer.assign(arm=run.arm, seed=run.seed))
    return pd.concat(frames, ignore_index=True)


WORD_PROBLEMS = {"steps": 16, "n": 50}


def word_problems_table(zoo: Zoo) -> pd.DataFrame:
    """Accuracy on word problems by S, unseen templates and real GSM8K items; others than looped ones at S = 1."""
    frames = []
    for model in GSM.of(zoo):
        frame = _word_problems(model).answer().drop(columns="model").rename(columns={"task": "problems"})
        frames.append(frame.assign(**label(model), s_max=zoo.s_max(model)))
    return pd.concat(frames, ignore_index=True)


def _word_problems(model: Run) -> Question:
    counts = [1, model.s_max] if model.arm == "loop" else [1]
    return question(model.name, "word-problems", counts, **WORD_PROBLEMS)


def references_table(zoo: Zoo) -> pd.DataFrame:
    """Unigram and bigram test NLL (nats per token) on the blocks that the text models are tested on."""
    records = [run.record for run in PAIR.of(zoo)]
    rows = [
        (task_of(record), kind, record["evaluation"][f"{kind}_nll"], record["evaluation"][f"{kind}_nll_se"])
        for record in records
        for kind in ("unigram", "bigram")
    ]
    return pd.DataFrame(rows, columns=["task", "reference", "nll", "standard_error"]).drop_duplicates()
