"""What a trained model can do, by number of loops: tidy tables with errors, cached by content.

`nll` test NELBO; `noise-level` where looping gains; `zero-shot` NELBO on corpora it never saw;
`solve-rate` of Sudoku by hidden cells and generation order; `excess-kl` over the exact posterior of `tree`
and `markov`, by hops. An entry of the cache is named by the hash of the weights and of what was asked.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from analysis import frames
from analysis.decomposition import nelbo_decomposition
from analysis.tables import wilson
from loopmdm_model import stats
from loopmdm_model.checkpoints import RECORD, TOKENIZER, WEIGHTS, need, resolve
from loopmdm_model.data import corpora, sudoku
from loopmdm_model.data.batches import encode, spread
from loopmdm_model.data.fetch import cache_folder, sources
from loopmdm_model.data.tokenizer import load_tokenizer
from loopmdm_model.data.trees import TREE_TASKS
from loopmdm_model.data.windows import sliding_windows
from loopmdm_model.errors import UsageError, check_count, unknown_name
from loopmdm_model.evaluation import TestSet, load_test_set, puzzles, task_of
from loopmdm_model.files import read_json, sha256
from loopmdm_model.likelihood import draw_masks, nelbo, nelbo_by_loop
from loopmdm_model.model import LoopMDM
from loopmdm_model.sampling import sample

VERSION = 1
"""Raised when a measure changes, so that older results are not taken for its own."""
ZERO_SHOT_DOCUMENTS, ZERO_SHOT_WINDOWS = 500, 512
SOLVE_GRIDS, HIDDEN, ORDERS = 200, (12, 16, 20, 26), ("confidence", "one-shot", "row-major", "hardest-first")


@dataclass(frozen=True)
class Subject:
    """A model with its test set."""

    name: str
    model: LoopMDM
    test: TestSet


def evaluate(name: str, measure: str, n_loops: list[int], n_samples: int = 2) -> pd.DataFrame:
    """One measure of one model at the loop counts `n_loops`; from the cache if nothing changed."""
    if measure not in MEASURES:
        raise unknown_name("measure", measure, MEASURES)
    counts = sorted({check_count("n_loops", count) for count in n_loops})
    folder = resolve(name)
    record = read_json(need(folder, RECORD))
    task = task_of(record)
    asked = json.dumps([VERSION, sha256(need(folder, WEIGHTS)), task, measure, counts, n_samples])
    path = cache_folder() / "evaluations" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.parquet"
    if path.is_file():
        return frames.read_table(path).assign(model=str(name))
    model = LoopMDM.from_pretrained(folder)
    tokenizer = load_tokenizer(need(folder, TOKENIZER), model.cfg.d_vocab)
    subject = Subject(str(name), model, load_test_set(task, model.cfg.n_ctx, tokenizer))
    frame = MEASURES[measure](subject, counts, n_samples)
    frame.insert(0, "model", str(name))
    frames.write_table(frame, path, {"asked": asked})
    return frame


def _at(frame: pd.DataFrame, counts: list[int]) -> pd.DataFrame:
    return frame[frame["n_loops"].isin(counts)].reset_index(drop=True)


def nll(subject: Subject, counts: list[int], n_samples: int) -> pd.DataFrame:
    """Test NELBO in nats per token, and bits per byte for text."""
    test, rows = subject.test, []
    for count in counts:
        r = nelbo(
            subject.model, test.tokens, count, n_samples=n_samples, maskable=test.maskable, clusters=test.clusters
        )
        rows.append((count, r.mean, r.standard_error, r.bits_per_byte(test.bytes_per_token), r.n))
    return pd.DataFrame(rows, columns=["n_loops", "nelbo", "standard_error", "bits_per_byte", "n"])


def noise_level(subject: Subject, counts: list[int], n_samples: int) -> pd.DataFrame:
    """NELBO and gain over S = 1 by mask ratio."""
    test = subject.test
    frame = nelbo_decomposition(
        subject.model,
        test.tokens,
        max(counts),
        n_samples=n_samples,
        maskable=test.maskable,
        clusters=test.clusters,
    )
    return _at(frame, counts)


def zero_shot(subject: Subject, counts: list[int], n_samples: int) -> pd.DataFrame:
    """NELBO, bits per byte and perplexity per token on the zero-shot corpora; errors over documents."""
    if math.isnan(subject.test.bytes_per_token):
        raise UsageError(f"{subject.name} is no text model; zero-shot needs one")
    tokenizer, rows = load_tokenizer(resolve(subject.name) / TOKENIZER, subject.model.cfg.d_vocab), []
    length = subject.model.cfg.n_ctx
    for corpus in [item.name for item in sources().values() if item.role == "zero-shot"]:
        documents = corpora.load(corpus)
        documents = documents[:: max(1, len(documents) // ZERO_SHOT_DOCUMENTS)]
        ids = encode(tokenizer, documents)
        bytes_per_token = sum(len(d.text.encode()) for d in documents) / sum(map(len, ids))
        w = sliding_windows([row.tolist() for row in ids], length, length)
        some = spread(torch.arange(len(w.tokens)), ZERO_SHOT_WINDOWS)
        owners = w.owners[some.numpy()]
        results = nelbo_by_loop(
            subject.model, w.tokens[some], max(counts), n_samples, w.scored[some], w.real[some], clusters=owners
        )
        for count in counts:
            r = results[count - 1]
            rows.append((corpus, count, r.mean, r.standard_error, r.bits_per_byte(bytes_per_token),
                         r.perplexity, r.n, len(np.unique(owners))))  # fmt: skip
    columns = ["corpus", "n_loops", "nelbo", "standard_error", "bits_per_byte", "perplexity", "n", "n_documents"]
    return pd.DataFrame(rows, columns=columns)


def solve_rate(subject: Subject, counts: list[int], n_samples: int) -> pd.DataFrame:  # noqa: ARG001
    """Share of 6x6 grids completed validly, by hidden cells and order, with Wilson's 95% interval.

    One cell a step (one-shot: all at once), always the best symbol; any valid completion counts.
    """
    if subject.test.task != "sudoku6":
        raise UsageError(f"{subject.name} was not trained on Sudoku; solve-rate needs such a model")
    rows = []
    for hidden in HIDDEN:
        b = puzzles(subject.test.tokens[:SOLVE_GRIDS], hidden)
        for order in ORDERS:
            for count in counts:
                r = sample(
                    subject.model, clues=b, steps=hidden, n_loops=count, order=order, temperature=0, batch_size=200
                )
                solved = sudoku.is_valid(r.tokens)
                low, high = wilson(int(solved.sum()), len(solved))
                rows.append((count, hidden, order, hidden, float(solved.float().mean()), low, high, len(solved)))
    return pd.DataFrame(rows, columns=["n_loops", "hidden", "order", "steps", "solve_rate", "low", "high", "n"])


@torch.no_grad()
def excess_kl(subject: Subject, counts: list[int], n_samples: int) -> pd.DataFrame:
    """KL(exact posterior || model) in nats per hidden node, by hops; masks as in the NELBO."""
    if subject.test.task not in TREE_TASKS:
        raise UsageError(f"{subject.name}: no exact posterior is known for {subject.test.task}")
    task, tokens = TREE_TASKS[subject.test.task], subject.test.tokens
    assert subject.test.maskable is not None
    most = task.n_nodes
    total, number = np.zeros((len(counts), len(tokens), most)), np.zeros((len(tokens), most))
    maskable = subject.test.maskable.expand_as(tokens)
    for draw in range(n_samples):
        b = draw_masks(tokens, subject.model.cfg.mask_token_id, maskable, 0, draw, n_samples)
        exact, hops = task.posterior(tokens, b.masked)[b.masked], task.hops(b.masked)[b.masked].numpy()
        owner = b.masked.nonzero()[:, 0].numpy()
        np.add.at(number, (owner, hops), 1)
        for loop, (state, context) in enumerate(subject.model.states(b.tokens, max(counts))):
            if loop + 1 in counts:
                logits = subject.model.readout(state, context, rows=b.masked)
                log_probs = logits.double().log_softmax(-1)[:, : task.n_states]
                kl = (exact * (exact.clamp(min=1e-300).log() - log_probs)).sum(-1).numpy()
                np.add.at(total[counts.index(loop + 1)], (owner, hops), kl)
    rows = []
    for index, count in enumerate(counts):
        for hop in np.flatnonzero(number.sum(0)):
            known = number[:, hop] > 0
            values = np.where(known, total[index, :, hop] / np.maximum(number[:, hop], 1), np.nan)
            mean, error, n = stats.weighted_mean_and_error(values, number[:, hop])
            rows.append((count, int(hop), float(mean), float(error), int(number[:, hop].sum()), int(n)))
    return pd.DataFrame(rows, columns=["n_loops", "hops", "excess_kl", "standard_error", "n_nodes", "n"])


MEASURES: dict[str, Callable[[Subject, list[int], int], pd.DataFrame]] = {
    "nll": nll,
    "noise-level": noise_level,
    "zero-shot": zero_shot,
    "solve-rate": solve_rate,
    "excess-kl": excess_kl,
}
