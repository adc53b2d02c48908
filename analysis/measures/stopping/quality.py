"""How good finished samples are, one number a sequence, so that two ways of sampling can be compared in pairs.

    solve-rate        share of boards that are valid (any completion counts); higher is better
    judge-nll         nats per token of another model (the sampler's own NLL is no fair judge); lower is better
    unigram-entropy   nats, of a sequence's own token frequencies; falls where a model repeats itself
    distinct-2        share of different pairs of neighbours among all; by sequence the jackknife's influences,
                      whose mean is the share and whose scatter its error

Entropy and pairs measure diversity, not quality: a judge likes repetition, so it is never read alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.analysis.measures.quality.generation import unigram_entropy
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.sampling import SampleResult, sample
from loopmdm.model.errors import UsageError
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.sudoku import Board

Judge = Callable[[Tensor], tuple[np.ndarray, np.ndarray]]
"""Token ids [n, pos] to nats and numbers of judge tokens, both [n]."""


@dataclass(frozen=True)
class Quality:
    """One measure of `n` samples: `values` and `weights`, both [n]."""

    measure: str
    values: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]

    def mean(self, clusters: np.ndarray | None = None) -> tuple[float, float, int]:
        """Weighted mean, its error (NaN for one sequence), n."""
        mean, error, n = stats.weighted_mean_and_error(self.values, self.weights, clusters)
        return float(mean), float(error), int(n)

    def against(self, other: "Quality", clusters: np.ndarray | None = None) -> tuple[float, float]:
        """Its mean less the other's, paired by sequence, and its error."""
        influence = np.zeros(len(self.values))
        for part, sign in ((self, 1), (other, -1)):
            mean = part.mean()[0]
            known = np.isfinite(part.values) & (part.weights > 0)
            scale = part.weights[known].mean() if known.any() else float("nan")
            influence = influence + sign * np.where(known, (part.values - mean) * part.weights / scale, 0.0)
        return self.mean()[0] - other.mean()[0], float(stats.influence_error(influence, clusters))


@dataclass(frozen=True)
class Samples:
    """Samples that are drawn alike but for loops and steps: what they start from, how, and who judges them."""

    n: int | None
    clues: MaskedBatch | None
    board: Board | None
    judge: Judge | None
    order: str
    temperature: float
    seed: int
    batch_size: int

    @classmethod
    def of(cls, board: Board | None, order: str | None, temperature: float | None, **given: Any) -> "Samples":
        """Sudoku: the order "confidence" at temperature 0 by default, else "random" at 1."""
        if board is not None and given["clues"] is None:
            raise UsageError("give the puzzles to solve as clues=; make them with puzzles(board, grids, n_clues)")
        order = order or ("random" if board is None else "confidence")
        temperature = temperature if temperature is not None else float(board is None)
        return cls(board=board, order=order, temperature=temperature, **given)

    def draw(self, m: LoopedModel, steps: int, **loops: Any) -> SampleResult:
        """One run, with n_loops= or stop=."""
        return sample(
            m, self.n, steps=steps, clues=self.clues, order=self.order, temperature=self.temperature,
            seed=self.seed, batch_size=self.batch_size, **loops,
        )  # fmt: skip

    def quality(self, r: SampleResult) -> list[Quality]:
        """What there is to say of a run."""
        return sample_quality(r.tokens, self.board, self.judge)


def sample_quality(
    tokens: Int[Tensor, "n pos"], board: Board | None = None, judge: Judge | None = None
) -> list[Quality]:
    """What there is to say of finished samples: boards by validity, text by diversity and a judge if given."""
    even = np.ones(len(tokens))
    if board is not None:
        if tokens.shape[1] != board.n_cells:
            raise UsageError(f"{board.name} has {board.n_cells} cells, the samples {tokens.shape[1]} tokens")
        return [Quality("solve-rate", board.is_valid(tokens).double().cpu().numpy(), even)]
    found = [
        Quality("unigram-entropy", unigram_entropy(tokens), even),
        Quality("distinct-2", _distinct_pairs(tokens), even),
    ]
    if judge is not None:
        nats, lengths = (np.asarray(value, dtype=float) for value in judge(tokens))
        if nats.shape != (len(tokens),) or lengths.shape != nats.shape:
            raise UsageError(f"a judge gives nats and counts of {len(tokens)} sequences, got {nats.shape}")
        known = np.where(lengths > 0, nats / np.maximum(lengths, 1), np.nan)
        found.append(Quality("judge-nll", known, lengths))
    return found


def _distinct_pairs(tokens: Tensor) -> Float[np.ndarray, " n"]:
    """Influences: leaving sequence i out loses the pairs that nobody else has."""
    n, width = len(tokens), tokens.shape[1] - 1
    if width < 1:
        return np.full(n, np.nan)
    pairs = torch.stack([tokens[:, :-1], tokens[:, 1:]], dim=-1).flatten(0, 1)
    kinds, kind = pairs.unique(dim=0, return_inverse=True)
    whole = len(kinds) / len(pairs)
    if n < 2:
        return np.full(n, whole)
    owned = torch.stack([kind, torch.arange(n, device=kind.device).repeat_interleave(width)], dim=1).unique(dim=0)
    holders = torch.bincount(owned[:, 0], minlength=len(kinds))
    own = torch.bincount(owned[:, 1][holders[owned[:, 0]] == 1], minlength=n).double().cpu().numpy()
    without = (len(kinds) - own) / (width * (n - 1))
    return whole - (n - 1) * (without - without.mean())
