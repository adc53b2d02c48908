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
from jaxtyping import Int
from torch import Tensor

from loopmdm_model import stats
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.likelihood import check_clean, loop_counts, loop_losses, row_sums
from loopmdm_model.model import LoopedModel


@torch.no_grad()
def nelbo_decomposition(
    m: LoopedModel,
    tokens: Int[Tensor, "batch pos"],
    n_loops: int | Sequence[int],
    by: Literal["mask_ratio", "position"] = "mask_ratio",
    n_bins: int = 10,
    n_samples: int = 8,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    clusters: np.ndarray | None = None,
) -> pd.DataFrame:
    """NELBO by noise level or position at every S = 1..n_loops, or at named counts, and what looping gains.

    Columns: n_loops; `mask_ratio` (the bin's middle) with `low`, `high`, or `position`; nll, standard_error;
    gain = nll at the least S (1, unless others are named) - nll, paired by sequence and mask, and
    gain_standard_error; n sequences. Nats per token; errors over sequences, or over `clusters`.
    """
    if by not in ("mask_ratio", "position"):
        raise UsageError(f'by must be "mask_ratio" or "position", got {by!r}')
    loops = loop_counts(n_loops)
    allowed, attention_mask = check_clean(m, tokens, maskable, attention_mask)
    width = check_count("n_bins", n_bins) if by == "mask_ratio" else tokens.shape[1]
    lengths = allowed.sum(-1)
    total = torch.zeros(len(loops), len(tokens), width, dtype=torch.float64)
    draws = torch.zeros(len(tokens), width, dtype=torch.float64)
    for span, part, losses in loop_losses(m, tokens, loops, n_samples, maskable, attention_mask, seed, batch_size):
        counts, size = part.masked.sum(-1), lengths[span]
        if by == "mask_ratio":
            rows = torch.arange(len(part))
            bins = ((counts * n_bins - 1) // size.clamp(min=1)).clamp(0, n_bins - 1).cpu()
            known = (counts > 0).cpu()
            mean = (row_sums(losses, part) / counts).cpu()
            total[:, span][:, rows[known], bins[known]] += mean[:, known]
            draws[span][rows[known], bins[known]] += 1
        else:
            row, position = part.masked.nonzero().T
            weight = (size / counts)[row]
            total[:, span].view(len(loops), -1).index_add_(
                1, (row * width + position).cpu(), (losses * weight).cpu()
            )
            draws[span] += 1
    values = (total / draws).numpy()  # [loop, batch, bin]; NaN where a sequence has no draw
    weights = lengths.double().cpu().numpy()
    if by == "position":
        values, weights = np.where(allowed.cpu().numpy(), values, np.nan), np.ones_like(weights)
    nll, error, n = stats.weighted_mean_and_error(values.swapaxes(0, 1), weights, clusters)
    gain, gain_error, _ = stats.weighted_mean_and_error((values[:1] - values).swapaxes(0, 1), weights, clusters)
    place = np.tile(np.arange(width), len(loops))
    frame = pd.DataFrame({"n_loops": np.repeat(loops, width)})
    if by == "mask_ratio":
        frame["mask_ratio"], frame["low"], frame["high"] = (
            (place + 0.5) / width, place / width, (place + 1) / width,
        )  # fmt: skip
    else:
        frame["position"] = place
    columns = {"nll": nll, "standard_error": error, "gain": gain, "gain_standard_error": gain_error, "n": n}
    return frame.assign(**{name: column.ravel() for name, column in columns.items()})
