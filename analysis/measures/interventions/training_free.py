"""Looping without training for it: repeat middle layers of a model that never looped, as a null and as a tool.

Layers first .. first + n - 1 of a frozen model run S times, naively or each loop damped by 1/S:

    H(i) = H(i-1) + strength * (loop(H(i-1)) - H(i-1)),   strength = 1 or 1/S

so that S damped loops are about as long as one. At S = 1 both are the model as it is. As a tool: does the NELBO
fall (`change` < 0)? As a null: does the masked queries' log-odds for masked keys rise over loops although nothing
was trained to? What rises here too is no mark of training with loops. After "training-free looping" (arXiv
2605.23872); the choice of blocks, the damping by 1/S and the measure are ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.analysis.measures.attention import mask_attention
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions import damp
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import NelboResult, Read, estimate, estimates_after
from loopmdm.model.errors import UsageError, check_count, unknown_name
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import mask_tokens
from loopmdm.model.protocol import Core, core_of
from loopmdm.model.sequences import MaskedBatch, Sequences

Damping = Literal["none", "1/n_loops"]
N_GROUPS = 10
COLUMNS = ["first_layer", "n_layers", "damping", "n_loops", "nelbo", "change", "change_se", "log_odds",
           "log_odds_se", "rise", "rise_se", "n_groups", "n"]  # fmt: skip


@torch.no_grad()
def training_free(
    m: HookedLoopMDM | Core,
    tokens: Int[Tensor, "batch pos"] | Sequences,
    maskable: Tensor | None = None,
    n_loops: Sequence[int] = (1, 2, 4, 8),
    blocks: Sequence[tuple[int, int]] | None = None,
    dampings: Sequence[Damping] = ("none", "1/n_loops"),
    mask_ratio: float = 0.5,
    n_samples: int = 2,
    attention_mask: Tensor | None = None,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """What repeating each block of middle layers does to the NELBO and to attention between masked positions.

    Columns: first_layer n_layers damping n_loops nelbo change change_se log_odds log_odds_se rise rise_se n_groups
    n.
    `blocks` are (first layer, number of layers), default: all that leave a layer before and one after. `change` is
    the NELBO at n_loops less that at 1, nats per token, the same sequences and masks. `log_odds` is that of
    `mask_attention` for masked queries in the last loop, mean over the block's layers and heads, at `mask_ratio`;
    `rise` is it less that of the first loop. Their errors are between n_groups (ten) groups of sequences, of whole
    `clusters`, each measured by itself; NaN for fewer than two. n counts the sequences of `change`.
    """
    plain = core_of(m)
    plain.facts.need("masks", "bidirectional", by="training-free looping")
    if plain.cfg.max_loops > 1:
        raise UsageError(f"this model loops by itself (S_max = {plain.cfg.max_loops}); give a non-looped one")
    counts = sorted({1, *(check_count("n_loops", count) for count in n_loops)})
    for damping in dampings:
        if damping not in get_args(Damping):
            raise unknown_name("damping", damping, get_args(Damping))
    places = middle_blocks(plain.cfg.n_layers) if blocks is None else list(blocks)
    if not places:
        raise UsageError(f"a model of {plain.cfg.n_layers} layers has no middle layer to repeat; name blocks=")
    sequences = Sequences.of(tokens, maskable, attention_mask, clusters).clean_for(m)
    read = Read(n_samples=n_samples, seed=seed, batch_size=batch_size)
    groups = _groups(mask_tokens(sequences, plain.cfg.mask_token_id, mask_ratio=mask_ratio, seed=seed))
    rows = []
    for first, n_layers in places:
        looped = HookedLoopMDM(plain.looping(first, n_layers))
        if isinstance(m, HookedLoopMDM):
            looped.reads_as(m)
        for damping in dampings:
            results = _nelbo(looped, sequences, counts, damping, read)
            odds = _log_odds(looped, groups, counts, damping, batch_size)
            for index, count in enumerate(counts):
                rows.append((first, n_layers, damping, count, *_row(results, odds, index, sequences.clusters)))
    return pd.DataFrame(rows, columns=COLUMNS)


def middle_blocks(n_layers: int) -> list[tuple[int, int]]:
    """All (first layer, number of layers) that leave a layer before and a layer after."""
    return [(first, size) for size in range(1, n_layers - 1) for first in range(1, n_layers - size)]


def _arm(m: HookedLoopMDM, damping: str, n_loops: int) -> AbstractContextManager:
    return nullcontext() if damping == "none" else damp(m, 1 / n_loops)


def _runs(counts: list[int], damping: str) -> Iterator[tuple[int, list[int]]]:
    """Loops to run, and the counts that this run tells: one naive trajectory holds all smaller ones."""
    if damping == "none":
        yield counts[-1], counts
    else:
        for count in counts:
            yield count, [count]


def _nelbo(
    m: HookedLoopMDM, sequences: Sequences, counts: list[int], damping: str, read: Read
) -> list[NelboResult]:
    """NELBO at each count."""
    if damping == "none":
        return estimates_after(m, sequences, counts, read)
    results = []
    for count in counts:
        with _arm(m, damping, count):
            results.append(estimate(m, sequences, replace(read, n_loops=count)))
    return results


def _groups(b: MaskedBatch) -> list[MaskedBatch]:
    """At most ten groups of sequences, near equal, none of which shares a cluster with another."""
    _, unit = np.unique(b.owners, return_inverse=True)
    number, alone = unit % min(N_GROUPS, unit.max() + 1), replace(b, clusters=None)
    return [alone.rows(np.flatnonzero(number == group)) for group in range(number.max() + 1)]


def _log_odds(
    m: HookedLoopMDM, groups: list[MaskedBatch], counts: list[int], damping: str, batch_size: int
) -> np.ndarray:
    """Log-odds [group, count] in the last of each count's loops, mean over the looped layers and heads."""
    values = np.full((len(groups), len(counts)), np.nan)
    for row, part in enumerate(groups):
        for n_loops, told in _runs(counts, damping):
            with _arm(m, damping, n_loops):
                frame = mask_attention(m, part, n_loops=n_loops, batch_size=batch_size)
            frame = frame.query("segment == 'loop' and query_group == key_group == 'masked'")
            heads = frame.groupby("loop")["log_odds"]
            by_loop = heads.agg(lambda values: values.to_numpy(dtype=float).mean())  # NaN if one head's is
            for count in told:
                values[row, counts.index(count)] = by_loop[count - 1]
    return values


def _row(results: list[NelboResult], odds: np.ndarray, index: int, clusters: np.ndarray | None) -> tuple:
    """What a row holds from `nelbo` on."""
    once, often = results[0], results[index]
    weights = once.lengths.double().numpy()
    change, change_se, n = stats.weighted_mean_and_error(
        (often.per_sequence - once.per_sequence).numpy(), weights, clusters
    )
    level, level_se, _ = stats.mean_and_error(odds[:, index])
    rise, rise_se, n_groups = stats.mean_and_error(odds[:, index] - odds[:, 0])
    return (often.mean, *map(float, (change, change_se, level, level_se, rise, rise_se)), int(n_groups), int(n))


def on_tests(
    case: Case,
    blocks: tuple[tuple[int, int], ...] | None = None,
    n_samples: int = 2,
    counts: tuple[int, ...] = (1, 2, 4, 8),
) -> pd.DataFrame:
    """Looping the middle of a non-looped stack at `counts`: `blocks` as in `training_free`, or every one."""
    return training_free(
        case.m, case.sequences, n_loops=counts, blocks=blocks, n_samples=n_samples, seed=case.seed
    )


MEASURES = (Measure("training-free", "a stack looped without training for it", on_tests, "test set"),)
