"""Generative perplexity by loops and denoising steps, never without its diversity."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.quality.judge import judge_nats
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.information import entropy
from loopmdm.model.tasks.batches import spread

COLUMNS = ["source", "n_loops", "steps", "order", "temperature", "top_p", "flops", "judge_nll", "judge_nll_se",
           "generative_perplexity", "judge_tokens", "unigram_entropy", "unigram_entropy_se", "distinct_2",
           "n"]  # fmt: skip


def generative(
    case: Case,
    counts: list[int],
    steps: Sequence[int] = (8, 16, 32, 64),
    order: str = "random",
    temperature: float = 1.0,
    top_p: float = 1.0,
    n: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """What a judge makes of `n` samples of n_ctx tokens, at every loop count and number of steps.

    `judge_nll` is in nats per judge token (error over samples); `unigram_entropy` (nats) of a sample's own tokens,
    averaged, and `distinct_2`, the share of different pairs of neighbours among all samples, fall where a model
    repeats itself; `flops` are those of one sample: rows of equal `flops` weigh loops against steps. The row
    with source "test text" is as much unseen text, measured alike.
    """
    case.need_text("generative")
    test = spread(case.test.tokens, n)
    columns = ("test text", 0, 0, "-", float("nan"), float("nan"), 0.0)
    rows = [(*columns, *_judged(case, test))]
    for count in counts:
        for number in steps:
            r = sample(
                case.m, n, None, number, count, order=order, temperature=temperature, top_p=top_p, seed=seed
            )
            settings = ("samples", count, number, order, temperature, top_p, r.flops / n)
            rows.append((*settings, *_judged(case, r.tokens)))
    return pd.DataFrame(rows, columns=COLUMNS)


def _judged(case: Case, tokens: Int[Tensor, "n pos"]) -> tuple:
    texts = case.tokenizer.decode_batch(tokens.tolist(), skip_special_tokens=True)
    nats, lengths = judge_nats(texts)
    known = np.where(lengths > 0, nats / np.maximum(lengths, 1), np.nan)
    nll, error, _ = stats.weighted_mean_and_error(known, lengths.astype(float))
    entropy, entropy_error, _ = stats.mean_and_error(unigram_entropy(tokens))
    return (float(nll), float(error), float(np.exp(nll)), int(lengths.sum()), float(entropy), float(entropy_error),
            distinct_pairs(tokens), len(tokens))  # fmt: skip


def unigram_entropy(tokens: Int[Tensor, "n pos"]) -> np.ndarray:
    """Entropy in nats of each sequence's own token frequencies [n]; at most log(pos)."""
    shares = [torch.bincount(row).double() / len(row) for row in tokens]
    return np.array([float(entropy(share.log(), share)) for share in shares])


def distinct_pairs(tokens: Int[Tensor, "n pos"]) -> float:
    """Different pairs of neighbours over all pairs of neighbours of all sequences."""
    pairs = torch.stack([tokens[:, :-1], tokens[:, 1:]], dim=-1).flatten(0, 1)
    return len(pairs.unique(dim=0)) / len(pairs)


MEASURES = (
    Measure(
        "generative",
        "perplexity of samples under a judge, by denoising steps",
        generative,
        "loops",
        others=False,
        samples=True,
    ),
)
