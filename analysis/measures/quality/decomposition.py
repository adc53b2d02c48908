"""Where the NELBO comes from, and where looping helps: by noise level or by position.

With exact counts l uniform on 1..L the NELBO is the plain mean of the cross-entropy over noise levels, so
the `nll` of equal bins of l / L averages to it, up to the bins' shares; sequences are weighted by their
maskable tokens, as in `nelbo`. By position, `nll` is the mean over masks and sequences of (cross-entropy if
masked) * L / l: its mean over positions, weighted by `n`, is the NELBO.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import Read, loop_counts, losses_after, row_sums
from loopmdm.model.errors import check_count, check_model, check_word
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import Sequences


@torch.no_grad()
def nelbo_decomposition(
    m: LoopedModel,
    tokens: Int[Tensor, "batch pos"] | Sequences,
    n_loops: int | Sequence[int],
    by: Literal["mask_ratio", "position"] = "mask_ratio",
    n_bins: int = 10,
    n_samples: int = 8,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 32,
    clusters: np.ndarray | None = None,
) -> pd.DataFrame:
    """NELBO by noise level or position at every S = 1..n_loops, or at named counts, and what looping gains.

    Columns: n_loops; `mask_ratio` (the bin's middle) with `low`, `high`, or `position`; nll, standard_error;
    gain = nll at the least S (1, unless others are named) - nll, paired by sequence and mask, and
    gain_standard_error; n sequences. Nats per token; errors over sequences, or over `clusters`.
    """
    check_model(m, "nelbo_decomposition")
    check_word("by", by, ("mask_ratio", "position"))
    loops = loop_counts(n_loops)
    sequences = Sequences.of(tokens, maskable, attention_mask, clusters).clean_for(m)
    read = Read(n_samples=n_samples, seed=seed, batch_size=batch_size)
    if by == "mask_ratio":
        return _noise(m, sequences, loops, check_count("n_bins", n_bins), read)
    return _positions(m, sequences, loops, read)


def _noise(m: LoopedModel, sequences: Sequences, loops: list[int], n_bins: int, read: Read) -> pd.DataFrame:
    lengths, n = sequences.lengths, len(sequences)
    total, draws = torch.zeros(len(loops), n, n_bins).double(), torch.zeros(n, n_bins).double()
    for span, part, losses in losses_after(m, sequences, loops, read):
        counts = part.masked.sum(-1)
        rows, bins = torch.arange(len(part)), noise_bins(counts, lengths[span], n_bins).cpu()
        known = (counts > 0).cpu()
        mean = (row_sums(losses, part) / counts).cpu()
        total[:, span][:, rows[known], bins[known]] += mean[:, known]
        draws[span][rows[known], bins[known]] += 1
    values = (total / draws).numpy()  # [loop, batch, bin]; NaN where a sequence has no draw
    return _by_noise(values, lengths.double().cpu().numpy(), loops, sequences.clusters)


def _positions(m: LoopedModel, sequences: Sequences, loops: list[int], read: Read) -> pd.DataFrame:
    n, width = sequences.tokens.shape
    total, draws = torch.zeros(len(loops), n, width).double(), torch.zeros(n, width).double()
    for span, part, losses in losses_after(m, sequences, loops, read):
        row, position = part.masked.nonzero().T
        weight = (sequences.lengths[span] / part.masked.sum(-1))[row]
        place = (row * width + position).cpu()
        total[:, span].view(len(loops), -1).index_add_(1, place, (losses * weight).cpu())
        draws[span] += 1
    values = np.where(sequences.allowed.cpu().numpy(), (total / draws).numpy(), np.nan)
    frame = _averaged(values, np.ones(n), loops, sequences.clusters)
    frame.insert(1, "position", np.tile(np.arange(width), len(loops)))
    return frame


def noise_bins(
    counts: Int[Tensor, " batch"], lengths: Int[Tensor, " batch"], n_bins: int
) -> Int[Tensor, " batch"]:
    """Which of `n_bins` equal bins of mask ratio `counts` of `lengths` masked positions fall in: (low, high]."""
    return ((counts * n_bins - 1) // lengths.clamp(min=1)).clamp(0, n_bins - 1)


def by_noise_level(
    nll: Float[np.ndarray, "loop batch"],
    n_loops: Sequence[int],
    counts: Int[Tensor, " batch"],
    lengths: Int[Tensor, " batch"],
    n_bins: int = 10,
    clusters: np.ndarray | None = None,
) -> pd.DataFrame:
    """`nelbo_decomposition` by mask ratio of what was measured already: `nll` at `n_loops`, one mask each.

    `counts` of `lengths` maskable positions were masked, as by `draw_counts`.
    """
    values = np.full((*nll.shape, n_bins), np.nan)
    row = np.flatnonzero(counts.numpy() > 0)
    values[:, row, noise_bins(counts, lengths, n_bins).numpy()[row]] = nll[:, row]
    return _by_noise(values, lengths.double().numpy(), loop_counts(n_loops), clusters)


def _by_noise(
    values: np.ndarray, weights: np.ndarray, loops: list[int], clusters: np.ndarray | None
) -> pd.DataFrame:
    frame, width = _averaged(values, weights, loops, clusters), values.shape[-1]
    place = np.tile(np.arange(width), len(loops))
    for column, shift in (("high", 1.0), ("low", 0.0), ("mask_ratio", 0.5)):
        frame.insert(1, column, (place + shift) / width)
    return frame


def _averaged(
    values: np.ndarray, weights: np.ndarray, loops: list[int], clusters: np.ndarray | None
) -> pd.DataFrame:
    """Means over sequences of `values` [loop, batch, bin] and of their gain, by loop count and bin."""
    nll, error, n = stats.weighted_mean_and_error(values.swapaxes(0, 1), weights, clusters)
    gain, gain_error, _ = stats.weighted_mean_and_error((values[:1] - values).swapaxes(0, 1), weights, clusters)
    columns = {"nll": nll, "standard_error": error, "gain": gain, "gain_standard_error": gain_error, "n": n}
    frame = pd.DataFrame({"n_loops": np.repeat(loops, values.shape[-1])})
    return frame.assign(**{name: column.ravel() for name, column in columns.items()})
