"""Likelihoods by number of loops: test NELBO, by noise level, zero-shot, and against exact posteriors."""

import numpy as np
import pandas as pd
import torch

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.quality.decomposition import nelbo_decomposition
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.corpora import documents as corpora
from loopmdm.model.corpora.fetch import sources
from loopmdm.model.corpora.windows import sliding_windows
from loopmdm.model.diffusion.likelihood import loop_counts, masked_draw, nelbo, nelbo_by_loop
from loopmdm.model.errors import UsageError
from loopmdm.model.information import kl
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.batches import GENERATED, encode

ZERO_SHOT_DOCUMENTS, ZERO_SHOT_WINDOWS = 500, 512


def nll(case: Case, counts: list[int], n_samples: int = 2) -> pd.DataFrame:
    """Test NELBO in nats per token, and bits per byte for text."""
    test, rows = case.test, []
    for count in counts:
        r = nelbo(case.m, case.sequences, count, n_samples=n_samples)
        rows.append((count, r.mean, r.standard_error, r.bits_per_byte(test.bytes_per_token), r.n))
    return pd.DataFrame(rows, columns=["n_loops", "nelbo", "standard_error", "bits_per_byte", "n"])


def at(frame: pd.DataFrame, counts: list[int]) -> pd.DataFrame:
    """The rows with one of the loop counts."""
    return frame[frame["n_loops"].isin(counts)].reset_index(drop=True)


def noise_level(case: Case, counts: list[int], n_samples: int = 2) -> pd.DataFrame:
    """NELBO and gain over S = 1 by mask ratio."""
    frame = nelbo_decomposition(case.m, case.sequences, [1, *counts], n_samples=n_samples)
    return at(frame, counts).assign(n_units=case.n_units)


def zero_shot_corpora() -> list[str]:
    """Names of the corpora of that role."""
    return [item.name for item in sources().values() if item.role == "zero-shot"]


def zero_shot(case: Case, counts: list[int], n_samples: int = 2) -> pd.DataFrame:
    """NELBO, bits per byte and perplexity per token on the zero-shot corpora; errors over documents."""
    case.need_text("zero-shot")
    length, rows = case.m.cfg.n_ctx, []
    for corpus in zero_shot_corpora():
        documents = corpora.load(corpus)
        documents = documents[:: max(1, len(documents) // ZERO_SHOT_DOCUMENTS)]
        ids = encode(case.tokenizer, documents)
        bytes_per_token = sum(len(d.text.encode()) for d in documents) / sum(map(len, ids))
        w = sliding_windows([row.tolist() for row in ids], length, length)
        some = w.sequences.spread(ZERO_SHOT_WINDOWS)
        results = nelbo_by_loop(case.m, some, counts, n_samples)
        for count, r in zip(loop_counts(counts), results, strict=True):
            rows.append((corpus, count, r.mean, r.standard_error, r.bits_per_byte(bytes_per_token),
                         r.perplexity, r.n, some.n_units))  # fmt: skip
    columns = ["corpus", "n_loops", "nelbo", "standard_error", "bits_per_byte", "perplexity", "n", "n_documents"]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def excess_kl(case: Case, counts: list[int], n_samples: int = 2, batch_size: int = 32) -> pd.DataFrame:
    """KL(exact posterior || model) in nats per hidden node, by hops; masks as in the NELBO."""
    if case.test.task not in GENERATED:
        raise UsageError(f"{case.m.model_name}: no exact posterior is known for {case.test.task}")
    task, sequences = GENERATED[case.test.task], case.sequences
    tokens = sequences.tokens
    most = task.n_nodes
    total, number = np.zeros((len(counts), len(tokens), most)), np.zeros((len(tokens), most))
    for draw in range(n_samples):
        b = masked_draw(sequences, case.m.cfg.mask_token_id, 0, draw, n_samples)
        distance = task.hops(b.masked, b.tokens)
        for span, part, found in b.each(batch_size, lambda part: _divergences(case, part, counts)):
            hidden = part.masked.cpu()  # where exact answers are
            hops = distance[span][hidden].numpy()
            owner = span.start + hidden.nonzero()[:, 0].numpy()
            np.add.at(number, (owner, hops), 1)
            for index, divergence in enumerate(found):
                np.add.at(total[index], (owner, hops), divergence)
    rows = []
    for index, count in enumerate(counts):
        for hop in np.flatnonzero(number.sum(0)):
            known = number[:, hop] > 0
            values = np.where(known, total[index, :, hop] / np.maximum(number[:, hop], 1), np.nan)
            mean, error, n = stats.weighted_mean_and_error(values, number[:, hop])
            rows.append((count, int(hop), float(mean), float(error), int(number[:, hop].sum()), int(n)))
    return pd.DataFrame(rows, columns=["n_loops", "hops", "excess_kl", "standard_error", "n_nodes", "n"])


def _divergences(case: Case, part: MaskedBatch, counts: list[int]) -> list[np.ndarray]:
    """KL of each hidden node, after each of `counts` loops in rising order."""
    task = GENERATED[case.test.task]
    exact, found = task.posterior(part.clean, part.masked)[part.masked.cpu()], []
    for loop, (state, context) in enumerate(case.m.states(part.tokens, max(counts)), start=1):
        if loop in counts:
            logits = case.m.readout(state, context, rows=part.masked)
            log_probs = logits.cpu().double().log_softmax(-1)[:, : task.n_states]
            found.append(kl(exact.log(), log_probs, exact).numpy())
    return found


MEASURES = (
    Measure(
        "nll",
        "test NELBO in nats per token, and bits per byte for text",
        nll,
        "loops",
        shards=True,
    ),
    Measure(
        "noise-level",
        "NELBO and gain over S = 1 by mask ratio",
        noise_level,
        "loops",
        shards=True,
    ),
    Measure(
        "zero-shot", "NELBO on corpora it never saw", zero_shot, "loops", others=False, goes_by=zero_shot_corpora
    ),
    Measure(
        "excess-kl",
        "excess over the exact posterior of tree, markov and arithmetic, by hops",
        excess_kl,
        "loops",
        others=False,
        shards=True,
    ),
)
