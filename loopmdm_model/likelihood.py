"""The NELBO of a masked diffusion model, in its exact-count form.

    NELBO = E over l ~ Uniform{1..L} and a random set of l masked positions of
            (L / l) * (sum of cross-entropies at the masked positions)

with L the sequence's own number of maskable positions. It equals the continuous-time NELBO with
weight 1/t (Sahoo et al. 2024, "MDLM"; Ou et al. 2024) without its singularity at t = 0. Divided by
L it is in nats per maskable token: the mean cross-entropy over the masked positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm_model import stats
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.masking import MaskedBatch, check_maskable, hide, pick_positions
from loopmdm_model.model import LoopedModel
from loopmdm_model.randomness import row_uniforms, step_generator
from loopmdm_model.stopping import StoppingRule, as_rule


@dataclass(frozen=True)
class NelboResult:
    """NELBO in nats per maskable token; `per_sequence` [batch] is NaN where nothing is maskable.

    `mean` weights sequences by their maskable tokens (perplexity = exp(mean)); `standard_error` is
    over sequences, or over documents where they share one. `n` counts sequences, `mean_loops` the
    loops run on average.
    """

    mean: float
    standard_error: float
    per_sequence: Float[Tensor, " batch"]
    n: int
    mean_loops: float


def draw_counts(
    lengths: Int[Tensor, " batch"], seed: int, draw: int, n_draws: int = 1, first_index: int = 0
) -> Int[Tensor, " batch"]:
    """Numbers of masked positions l_b in 1..L_b for one of `n_draws` draws, jittered-stratified.

    The unit interval is cut into n_draws coarse strata, one a draw, and each of those into one
    stratum a sequence, handed out by a fresh permutation at every draw. With n_draws = 1 this is
    l_b = min(floor((u_b + pi(b)) / B * L), L - 1) + 1. Sequences without maskable positions get 0.
    """
    n = len(lengths)
    order = torch.from_numpy(step_generator(seed, "order", draw).permutation(n))
    jitter = row_uniforms(seed, "counts", n, 1, first_index=first_index, step=draw)[:, 0]
    place = (draw % n_draws + (order + jitter) / n) / n_draws
    counts = torch.minimum((place.to(lengths.device) * lengths).floor().long(), lengths - 1) + 1
    return counts.clamp(min=0)


def draw_masks(
    tokens: Tensor,
    mask_token_id: int,
    maskable: Tensor,
    seed: int,
    draw: int,
    n_draws: int = 1,
    attention_mask: Tensor | None = None,
) -> MaskedBatch:
    """One draw of the exact-count forward process for every sequence."""
    counts = draw_counts(maskable.sum(-1), seed, draw, n_draws)
    uniforms = row_uniforms(seed, "positions", *tokens.shape, step=draw).to(tokens.device)
    return hide(tokens, pick_positions(uniforms, maskable, counts), mask_token_id, maskable, attention_mask)


def masked_cross_entropy(logits: Tensor, batch: MaskedBatch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over the masked positions of each sequence, float32; NaN where none is."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch.clean.flatten().long(), reduction="none")
    losses = losses.view(batch.clean.shape).masked_fill(~batch.masked, 0.0)
    return losses.sum(-1) / batch.masked.sum(-1)


@torch.no_grad()
def nelbo(
    model: LoopedModel,
    tokens: Int[Tensor, "batch pos"],
    n_loops: int | None = None,
    stop: StoppingRule | None = None,
    n_samples: int = 8,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    clusters: np.ndarray | None = None,
) -> NelboResult:
    """Estimate the NELBO of clean `tokens` with `n_samples` masks a sequence.

    `maskable` marks what is predicted (the rest is condition); padding is never maskable. The model
    may be a LoopMDM or a HookedLoopMDM. The same seed gives the same masks, so two models or two
    settings are compared on paired draws. `clusters` [batch] names the document of each sequence where
    several share one; the error is then over documents. Only as many sequences as `batch_size` run at a time.
    """
    check_count("n_samples", n_samples)
    check_count("batch_size", batch_size)
    as_rule(n_loops, stop, model.cfg.max_loops)
    tokens, allowed = _check_clean(model, tokens, maskable, attention_mask)
    total, loops = torch.zeros(len(tokens), dtype=torch.float64), 0.0
    for draw in range(n_samples):
        batch = draw_masks(tokens, model.cfg.mask_token_id, allowed, seed, draw, n_samples, attention_mask)
        for start in range(0, len(tokens), batch_size):
            part = batch.rows(slice(start, start + batch_size))
            run = model.run(part.tokens, n_loops=n_loops, stop=stop, attention_mask=part.attention_mask)
            total[start : start + batch_size] += masked_cross_entropy(run.logits, part).cpu()
            loops += run.loops_used.sum().item()
    return summarise(total / n_samples, allowed.sum(-1).cpu(), loops / (n_samples * len(tokens)), clusters)


@torch.no_grad()
def nelbo_by_loop(
    model: LoopedModel,
    tokens: Int[Tensor, "batch pos"],
    n_loops: int,
    n_samples: int = 8,
    maskable: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    clusters: np.ndarray | None = None,
) -> list[NelboResult]:
    """NELBO at every S = 1..n_loops off one trajectory: entry S - 1 equals `nelbo(.., n_loops=S)`."""
    check_count("n_samples", n_samples)
    tokens, allowed = _check_clean(model, tokens, maskable, None)
    total = torch.zeros(n_loops, len(tokens), dtype=torch.float64)
    for draw in range(n_samples):
        batch = draw_masks(tokens, model.cfg.mask_token_id, allowed, seed, draw, n_samples)
        for start in range(0, len(tokens), batch_size):
            part = batch.rows(slice(start, start + batch_size))
            for loop, (state, context) in enumerate(model.states(part.tokens, n_loops)):
                losses = masked_cross_entropy(model.readout(state, context), part)
                total[loop, start : start + batch_size] += losses.cpu()
    lengths = allowed.sum(-1).cpu()
    return [summarise(row / n_samples, lengths, loop + 1.0, clusters) for loop, row in enumerate(total)]


def _check_clean(
    model: LoopedModel, tokens: Tensor, maskable: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise UsageError(f"tokens must be a non-empty [batch, pos] tensor, got shape {list(tokens.shape)}")
    if bool((tokens == model.cfg.mask_token_id).any()):
        raise UsageError("tokens already hold [MASK]; the likelihood needs clean tokens")
    return tokens, check_maskable(tokens, maskable, attention_mask)


def summarise(
    per_sequence: Tensor, lengths: Tensor, mean_loops: float, clusters: np.ndarray | None = None
) -> NelboResult:
    """Token-weighted mean with the ratio estimator's standard error over sequences or clusters."""
    values, weights = per_sequence.numpy(), lengths.double().numpy()
    known = weights > 0
    n = int(known.sum())
    if not n:
        return NelboResult(float("nan"), float("nan"), per_sequence, 0, mean_loops)
    mean = float((values[known] * weights[known]).sum() / weights.sum())
    influence = np.where(known, (values - mean) * weights / weights[known].mean(), np.nan)
    error = float(stats.influence_error(influence, clusters))
    return NelboResult(mean, error, per_sequence, n, mean_loops)
