"""The NELBO of a masked diffusion model, by its exact-count form.

    NELBO = E over l ~ Uniform{1..L} and a random set of l masked positions of
            (L / l) * (sum of cross-entropies at the masked positions)

with L the sequence's own number of maskable positions. It equals the continuous-time NELBO with
weight 1/t (Sahoo et al. 2024, "MDLM"; Ou et al. 2024) without its singularity at t = 0. Divided by
L it is in nats per maskable token: the mean cross-entropy over the masked positions.

Padding is neither masked, scored nor attended to. An end-of-text token is a token like any other:
where a corpus holds it, it is scored.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.model import flops, means
from loopmdm.model.blocks import RowLogits
from loopmdm.model.corpora.ids import IdLists, id_lists
from loopmdm.model.corpora.windows import sliding_windows
from loopmdm.model.errors import UsageError, check_count, check_model, check_word
from loopmdm.model.masking import hide, pick_positions
from loopmdm.model.precision import check_logits, wide
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.randomness import row_uniforms, step_generator
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.stopping.rules import StoppingRule, as_rule

Estimator = Literal["exact-count", "stratified-t", "independent-t"]
LEAST_T = 1e-3


@dataclass(frozen=True)
class Read:
    """How sequences are read: `n_loops` or a `stop` rule (neither: S_max), masks a sequence and their seed.

    Only as many sequences as `batch_size` run at a time.
    """

    n_loops: int | None = None
    stop: StoppingRule | None = None
    n_samples: int = 8
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self):
        """Counts are counts."""
        for name in ("n_samples", "batch_size"):
            check_count(name, getattr(self, name))


@dataclass(frozen=True)
class NelboResult:
    """NELBO in nats per maskable token; `per_sequence` [batch] is NaN where nothing is maskable.

    `mean` weights sequences by their maskable tokens (`lengths` [batch]); `standard_error` is over
    sequences, or over documents where they share one. `per_sequence_error` [batch] is each sequence's own
    error, over its masks (NaN for one mask; on the safe side, as masks are stratified). `n` counts sequences,
    `mean_loops` the loops run on average, `flops` all that the forwards cost.
    """

    mean: float
    standard_error: float
    per_sequence: Float[Tensor, " batch"]
    n: int
    mean_loops: float
    lengths: Int[Tensor, " batch"]
    flops: float
    per_sequence_error: Float[Tensor, " batch"]

    @property
    def perplexity(self) -> float:
        """exp(mean): per token, as the mean runs over tokens."""
        return math.exp(self.mean)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Bits per byte of text whose tokens hold `bytes_per_token` bytes on average."""
        return self.mean / math.log(2) / bytes_per_token


def draw_counts(
    lengths: Int[Tensor, " batch"],
    seed: int,
    draw: int,
    n_draws: int = 1,
    first_index: int = 0,
    whole: int | None = None,
) -> Int[Tensor, " batch"]:
    """Numbers of masked positions l_b in 1..L_b for one of `n_draws` draws, jittered-stratified.

    The unit interval is cut into n_draws coarse strata, one a draw, and each of those into one
    stratum a sequence, handed out by a fresh permutation at every draw. With n_draws = 1 this is
    l_b = min(floor((u_b + pi(b)) / B * L), L - 1) + 1. Sequences without maskable positions get 0. Where they are
    part of a `whole` of so many, they begin there with number `first_index`.
    """
    n, strata = _strata(len(lengths), seed, draw, first_index, whole)
    jitter = row_uniforms(seed, "counts", len(lengths), 1, first_index=first_index, step=draw)[:, 0]
    place = (draw % n_draws + (strata + jitter) / n) / n_draws
    counts = torch.minimum((place.to(lengths.device) * lengths).floor().long(), lengths - 1) + 1
    return counts.clamp(min=0)


def masked_draw(sequences: Sequences, mask_token_id: int, seed: int, draw: int, n_draws: int = 1) -> MaskedBatch:
    """One draw of the exact-count forward process for every sequence."""
    counts = draw_counts(sequences.lengths, seed, draw, n_draws, sequences.first, _whole(sequences))
    masked = pick_positions(_uniforms(sequences, seed, draw), sequences.allowed, counts)
    return hide(sequences, masked, mask_token_id)


def draw_masks(
    tokens: Tensor,
    mask_token_id: int,
    maskable: Tensor,
    seed: int,
    draw: int,
    n_draws: int = 1,
    attention_mask: Tensor | None = None,
) -> MaskedBatch:
    """As `masked_draw`, of clean tokens [batch, pos] and what of them may be masked; scripts elsewhere call it."""
    return masked_draw(Sequences.of(tokens, maskable, attention_mask), mask_token_id, seed, draw, n_draws)


def _uniforms(sequences: Sequences, seed: int, draw: int) -> Float[Tensor, "batch pos"]:
    tokens = sequences.tokens
    drawn = row_uniforms(seed, "positions", *tokens.shape, first_index=sequences.first, step=draw)
    return drawn.to(tokens.device)


def _whole(sequences: Sequences) -> int:
    """How many there are with those of other shards."""
    return len(sequences) if sequences.place is None else sequences.place.n


def _strata(
    rows: int, seed: int, draw: int, first_index: int, whole: int | None
) -> tuple[int, Int[Tensor, " batch"]]:
    """How many strata there are, one a sequence, and those of some `rows`: all, or part of a `whole`."""
    n = rows if whole is None else whole
    order = torch.from_numpy(step_generator(seed, "order", draw).permutation(n))
    return n, order if whole is None else order[first_index : first_index + rows]


def draw_times(
    n: int, seed: int, draw: int, stratified: bool = True, first_index: int = 0, whole: int | None = None
) -> Float[Tensor, " batch"]:
    """Diffusion times in [LEAST_T, 1], one a sequence: independent, or one in each of n strata.

    `first_index` and `whole` as of `draw_counts`.
    """
    times = row_uniforms(seed, "counts", n, 1, first_index=first_index, step=draw)[:, 0]
    if stratified:
        number, strata = _strata(n, seed, draw, first_index, whole)
        times = (times + strata) / number
    return LEAST_T + (1 - LEAST_T) * times


def draws(
    model: LoopedModel, sequences: Sequences, read: Read, estimator: Estimator = "exact-count"
) -> Iterator[tuple[MaskedBatch, Float[Tensor, " batch"]]]:
    """Masks, and the weights that turn sequences' sums of cross-entropies into nats per token, draw by draw."""
    check_word("estimator", estimator, get_args(Estimator))
    model.cfg.facts.need("masks", by="the likelihood")
    mask_token_id = model.cfg.mask_token_id
    for draw in range(read.n_samples):
        if estimator == "exact-count":
            batch = masked_draw(sequences, mask_token_id, read.seed, draw, read.n_samples)
            yield batch, 1 / batch.masked.sum(-1).double()
            continue
        stratified = estimator == "stratified-t"
        times = draw_times(len(sequences), read.seed, draw, stratified, sequences.first, _whole(sequences))
        times = times.to(sequences.tokens.device)
        masked = (_uniforms(sequences, read.seed, draw) < times[:, None]) & sequences.allowed
        yield hide(sequences, masked, mask_token_id), 1 / (times * sequences.lengths)


def masked_cross_entropy(logits: Tensor, batch: MaskedBatch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over the masked positions of each sequence, in float32 at least; NaN where none is."""
    losses = F.cross_entropy(wide(logits).flatten(0, 1), batch.clean.flatten().long(), reduction="none")
    losses = losses.view(batch.clean.shape).masked_fill(~batch.masked, 0.0)
    return losses.sum(-1) / batch.masked.sum(-1)


def packed_cross_entropy(logits: Float[Tensor, "row d_vocab"], batch: MaskedBatch) -> Float[Tensor, " batch"]:
    """As `masked_cross_entropy`, of the logits at the masked positions alone, in reading order."""
    losses = F.cross_entropy(wide(logits), batch.clean[batch.masked].long(), reduction="none")
    return row_sums(losses, batch) / batch.masked.sum(-1)


def row_cross_entropy(logits: Float[Tensor, "row d_vocab"], batch: MaskedBatch) -> Float[Tensor, " row"]:
    """Cross-entropies at the masked positions of a batch, in reading order, float64.

    NotFiniteError if the logits say nothing; UsageError if nobody knows what is hidden.
    """
    check_logits(logits)
    return F.cross_entropy(wide(logits), batch.truth("a loss")[batch.masked].long(), reduction="none").double()


def read_cross_entropy(reading: RowLogits, batch: MaskedBatch) -> Float[Tensor, " row"]:
    """As `row_cross_entropy`, of logits that are made block by block."""
    truth = batch.truth("a loss")[batch.masked].long()
    return reading.each(lambda span, logits: F.cross_entropy(wide(logits), truth[span], reduction="none").double())


def row_sums(values: Float[Tensor, "*loop row"], batch: MaskedBatch) -> Float[Tensor, "*loop batch"]:
    """Sums of such values over each sequence."""
    owner = batch.masked.nonzero()[:, 0]
    return values.new_zeros(*values.shape[:-1], len(batch)).index_add(-1, owner, values)


def nelbo(
    model: LoopedModel,
    tokens: Int[Tensor, "batch pos"] | Sequences,
    n_loops: int | None = None,
    stop: StoppingRule | None = None,
    n_samples: int = 8,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 32,
    clusters: np.ndarray | None = None,
    estimator: Estimator = "exact-count",
) -> NelboResult:
    """Estimate the NELBO of clean `tokens` (or `Sequences`) with `n_samples` masks a sequence.

    `maskable` marks what is predicted (the rest is condition); padding is never maskable. The model
    may be a LoopMDM or a HookedLoopMDM. The same seed gives the same masks, so two models or two
    settings are compared on paired draws. `clusters` [batch] names the document of each sequence where
    several share one; the error is then over documents. Only as many sequences as `batch_size` run at a time.

    `estimator` "stratified-t" and "independent-t" draw a time t in [1e-3, 1], mask each position with
    probability t and weigh by 1 / t, as usual elsewhere: for comparison, as they scatter more.

    >>> round(lm.nelbo(m, b.clean, n_loops=4, seed=0).mean, 2)
    0.46
    """
    check_model(model, "nelbo")
    sequences = Sequences.of(tokens, maskable, attention_mask, clusters).clean_for(model)
    return estimate(model, sequences, Read(n_loops, stop, n_samples, seed, batch_size), estimator)


@torch.no_grad()
def estimate(
    model: LoopedModel, sequences: Sequences, read: Read, estimator: Estimator = "exact-count"
) -> NelboResult:
    """`nelbo` of sequences that `model` can read (`Sequences.clean_for`)."""
    as_rule(read.n_loops, read.stop, model.cfg.max_loops)
    total, loops, cost = torch.zeros(2, len(sequences), dtype=torch.float64), 0.0, 0.0

    def work(part: MaskedBatch) -> tuple[Tensor, int, float]:
        run = model.run(
            part.tokens,
            read.n_loops,
            read.stop,
            attention_mask=part.attention_mask,
            rows=part.masked,
            into=lambda reading: read_cross_entropy(reading, part),
        )
        return row_sums(run.logits, part), int(run.loops_used.sum()), run.flops.sum().item()

    for batch, weight in draws(model, sequences, read, estimator):
        for span, _, (losses, used, spent) in batch.each(read.batch_size, work):
            value = (losses * weight[span].to(losses.device)).cpu()
            total[:, span] += torch.stack([value, value**2])
            loops += used
            cost += spent
    return summarise(total, sequences, read.n_samples, loops / (read.n_samples * len(sequences)), cost)


def loop_counts(n_loops: int | Sequence[int]) -> list[int]:
    """1..n_loops, or the counts that are named, in rising order."""
    if not isinstance(n_loops, Sequence):
        return list(range(1, check_count("n_loops", n_loops) + 1))
    counts = sorted({check_count("n_loops", count) for count in n_loops})
    if not counts:
        raise UsageError("n_loops names no loop count; give at least one")
    return counts


def losses_after(
    model: LoopedModel, sequences: Sequences, counts: list[int], read: Read
) -> Iterator[tuple[slice, MaskedBatch, Float[Tensor, "loop row"]]]:
    """Cross-entropies at the masked positions after each of `counts` loops in rising order, off one trajectory.

    Of sequences that `model` can read. Yields the span of sequences, their masks, and the losses in reading order;
    each draw visits all sequences. The draws are those of `nelbo`.
    """

    def work(part: MaskedBatch) -> Tensor:
        trajectory = model.states(part.tokens, counts[-1], part.attention_mask)
        losses = [
            read_cross_entropy(model.read(state, context, rows=part.masked), part)
            for loop, (state, context) in enumerate(trajectory, start=1)
            if loop in counts
        ]
        return torch.stack(losses)

    for batch, _ in draws(model, sequences, read):
        yield from batch.each(read.batch_size, work)


def nelbo_by_loop(
    model: LoopedModel,
    tokens: Int[Tensor, "batch pos"] | Sequences,
    n_loops: int | Sequence[int],
    n_samples: int = 8,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 32,
    clusters: np.ndarray | None = None,
) -> list[NelboResult]:
    """NELBO at every S = 1..n_loops off one trajectory: entry S - 1 equals `nelbo(.., n_loops=S)`.

    With several counts as `n_loops`, an entry for each of `loop_counts`. `flops` is what a run of S loops alone
    would cost.
    """
    counts = loop_counts(n_loops)
    sequences = Sequences.of(tokens, maskable, attention_mask, clusters).clean_for(model)
    return estimates_after(model, sequences, counts, Read(n_samples=n_samples, seed=seed, batch_size=batch_size))


@torch.no_grad()
def estimates_after(model: LoopedModel, sequences: Sequences, counts: list[int], read: Read) -> list[NelboResult]:
    """`nelbo_by_loop` of sequences that `model` can read, after each of `counts` loops in rising order."""
    total = torch.zeros(len(counts), 2, len(sequences), dtype=torch.float64)
    cfg, length, cost = model.cfg, sequences.tokens.shape[1], 0.0
    for span, part, losses in losses_after(model, sequences, counts, read):
        value = (row_sums(losses, part) / part.masked.sum(-1)).cpu()
        total[:, :, span] += torch.stack([value, value**2], dim=1)
        ends = cfg.n_prelude_layers * cfg.layer_flops(length)
        cost += float((ends + flops.readout_flops(cfg, length, part.masked.sum(-1))).sum())
    loop_cost = read.n_samples * len(sequences) * cfg.n_loop_layers * cfg.layer_flops(length)
    return [
        summarise(row, sequences, read.n_samples, float(count), cost + count * loop_cost)
        for count, row in zip(counts, total, strict=True)
    ]


def continuation_nelbo(
    model: LoopedModel,
    prompts: IdLists,
    continuations: IdLists,
    n_loops: int | None = None,
    stop: StoppingRule | None = None,
    n_samples: int = 8,
    seed: int = 0,
    batch_size: int = 32,
) -> NelboResult:
    """NELBO of each continuation given its prompt (token ids); the log-likelihood is -per_sequence * lengths."""
    check_model(model, "continuation_nelbo")
    prompts, continuations = id_lists("prompts", prompts), id_lists("continuations", continuations)
    if len(prompts) != len(continuations) or not continuations:
        raise UsageError(f"give one prompt a continuation, got {len(prompts)} and {len(continuations)}")
    if not all(continuations):
        raise UsageError("a continuation is empty; give at least one token to predict")
    length = max(len(p) + len(c) for p, c in zip(prompts, continuations, strict=True))
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    real, maskable = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        ids = [*prompt, *continuation]
        tokens[row, : len(ids)] = torch.tensor(ids)
        real[row, : len(ids)] = True
        maskable[row, len(prompt) : len(ids)] = True
    sequences = Sequences.of(tokens, maskable, real).clean_for(model)
    return estimate(model, sequences, Read(n_loops, stop, n_samples, seed, batch_size))


def corpus_nelbo(
    model: LoopedModel,
    documents: IdLists,
    stride: int | None = None,
    n_loops: int | None = None,
    stop: StoppingRule | None = None,
    n_samples: int = 2,
    seed: int = 0,
    batch_size: int = 32,
) -> NelboResult:
    """NELBO of whole documents (token ids) in windows of n_ctx; `.perplexity` is the corpus perplexity.

    Windows advance by `stride` (default n_ctx), the last of a document ends with it; what an earlier window
    scored is clean context for the next, so every token is scored exactly once. The error is over documents.
    """
    check_model(model, "corpus_nelbo")
    windows = sliding_windows(documents, model.cfg.n_ctx, model.cfg.n_ctx if stride is None else stride)
    return estimate(model, windows.sequences.clean_for(model), Read(n_loops, stop, n_samples, seed, batch_size))


def summarise(
    totals: Float[Tensor, "two batch"], sequences: Sequences, n_samples: int, mean_loops: float, cost: float
) -> NelboResult:
    """Token-weighted mean with its error, from sums over masks of each sequence's value and its square."""
    per_sequence, square = totals / n_samples
    scatter = (square - per_sequence**2).clamp(min=0) / max(1, n_samples - 1)
    own_error = scatter.sqrt() if n_samples > 1 else torch.full_like(scatter, float("nan"))
    lengths = sequences.lengths.cpu()
    mean, error, n = means.weighted_mean_and_error(
        per_sequence.numpy(), lengths.double().numpy(), sequences.clusters
    )
    return NelboResult(float(mean), float(error), per_sequence, int(n), mean_loops, lengths, cost, own_error)
