"""What a dictionary keeps of what matters: its reconstruction is put in the run, and the model goes on from there.

    loss recovered = (loss with the mean there - loss spliced) / (loss with the mean there - loss intact)

1: nothing is lost; 0: no better than each site's mean. Losses are in nats at the positions that are asked, and
each site is spliced alone, at the dictionary's positions. In a model whose losses do not depend on the site
nothing can be recovered; the same share of the divergence, 1 - KL(intact || spliced) / KL(intact || mean), is
defined there, too. A crosscoder's code is that of the intact run and has seen later loops (`coder`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.activations import Wanted
from loopmdm.analysis.activations.catching import catch
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import row_mean
from loopmdm.model.errors import UsageError, check_count, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import kl
from loopmdm.model.precision import check_logits, wide
from loopmdm.model.sequences import MaskedBatch

ARMS = ("spliced", "mean", "zero")


@contextmanager
def splice(
    m: HookedLoopMDM, site: str, values: Float[Tensor, "row d_model"], rows: Bool[Tensor, "batch pos"]
) -> Iterator[HookedLoopMDM]:
    """Put `values` at the positions `rows` of a site, in reading order."""
    check_model(m, "splice", hooked=True)

    def put(current: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        if rows.shape != current.shape[:2] or values.shape != (int(rows.sum()), current.shape[-1]):
            raise UsageError(
                f"values {list(values.shape)} at {int(rows.sum())} rows of {list(rows.shape)} do not fit a site "
                f"of {list(current.shape)}; give one vector a row"
            )
        current[rows] = values.to(current.dtype)
        return current

    with m.hooks([(site, put)]):
        yield m


@dataclass(frozen=True)
class Spliced:
    """By sequence: `intact` [sequence]; `losses` and `divergences` [arm, site, sequence], arms as in `ARMS`, nats.

    `left` and `spread` [site, sequence]: squared error of the states, and squared distance from the site's mean.
    """

    intact: np.ndarray
    losses: np.ndarray
    divergences: np.ndarray
    left: np.ndarray
    spread: np.ndarray
    clusters: np.ndarray | None = None

    def loss_recovered(self, site: int) -> tuple[float, float, int]:
        """Share, its error over sequences or documents, n; NaN where the mean costs nothing beyond its error."""
        spliced, mean = self.losses[0, site], self.losses[1, site]
        return stats.ratio_of_means(mean - spliced, mean - self.intact, self.clusters)

    def kl_recovered(self, site: int) -> tuple[float, float, int]:
        """As `loss_recovered`, of the divergence from the intact run."""
        spliced, mean = self.divergences[0, site], self.divergences[1, site]
        return stats.ratio_of_means(mean - spliced, mean, self.clusters)

    def explained(self, site: int) -> tuple[float, float, int]:
        """Share of the states' variance that is given back."""
        return stats.ratio_of_means(self.spread[site] - self.left[site], self.spread[site], self.clusters)


@torch.no_grad()
def splice_losses(
    m: HookedLoopMDM,
    b: MaskedBatch,
    dictionary: Dictionary,
    arms: Sequence[str] = ARMS,
    batch_size: int = 32,
) -> Spliced:
    """Losses of a batch: intact, and with each site spliced, set to its mean, and set to 0.

    `arms` may leave "zero" out, which no share needs.

    UsageError for a dictionary of another model, and where nothing is asked.
    """
    dictionary.check(m)
    b = questions("splice_losses", m, b)
    check_count("batch_size", batch_size)
    if tuple(arms) not in (ARMS, ARMS[:2]):
        raise UsageError(f"arms are {ARMS} or the first two, got {arms!r:.60}")
    parts = [_losses(m, part, dictionary, len(arms)) for _, part in b.batches(batch_size)]
    joined = [np.concatenate(found, -1) for found in zip(*parts, strict=True)]
    return Spliced(*joined, clusters=b.clusters)  # pyright: ignore


def _losses(m: HookedLoopMDM, b: MaskedBatch, dictionary: Dictionary, n_arms: int) -> tuple[np.ndarray, ...]:
    names = list(dictionary.origin.sites)
    rows = Wanted(positions=dictionary.origin.positions).members(m, b)  # pyright: ignore
    caught = catch(m, b, dictionary.origin.n_loops, names, rows)
    x = wide(torch.stack([caught[name] for name in names], 1))
    given = dictionary(x).to(x)
    means = dictionary.means.to(x)
    intact = _answers(m, b, dictionary.origin.n_loops)
    losses, divergences = [], []
    for values in (given, means.expand_as(x), torch.zeros_like(x))[:n_arms]:
        found = [_spliced(m, b, (name, values[:, at], rows), dictionary) for at, name in enumerate(names)]
        losses.append([_loss(m, b, log_p) for log_p in found])
        divergences.append([_mean(kl(intact, log_p), b) for log_p in found])
    owned = [_by_sequence(part, rows) for part in ((x - given), (x - means))]
    return (_loss(m, b, intact), np.array(losses), np.array(divergences), *owned)


def _spliced(m: HookedLoopMDM, b: MaskedBatch, what: tuple[str, Tensor, Tensor], dictionary: Dictionary) -> Tensor:
    with splice(m, *what):
        return _answers(m, b, dictionary.origin.n_loops)


def _answers(m: HookedLoopMDM, b: MaskedBatch, n_loops: int) -> Float[Tensor, "row d_vocab"]:
    logits = m.run(b.tokens, n_loops, attention_mask=b.attention_mask, rows=b.masked).logits
    check_logits(logits)
    return wide(logits).log_softmax(-1)


def _loss(m: HookedLoopMDM, b: MaskedBatch, log_p: Tensor) -> np.ndarray:
    right = (b.clean if m.facts.causal else b.truth("splice_losses"))[b.masked]
    return _mean(-log_p.gather(-1, right[:, None])[:, 0], b)


def _mean(values: Tensor, b: MaskedBatch) -> np.ndarray:
    return row_mean(values.double(), b.masked).cpu().numpy()


def _by_sequence(gap: Float[Tensor, "row site d_model"], rows: Tensor) -> np.ndarray:
    """Sum of squares [site, sequence]; NaN where a sequence has no rows."""
    owner = rows.nonzero()[:, 0]
    total = gap.new_zeros(len(rows), gap.shape[1], dtype=torch.float64)
    total.index_add_(0, owner, gap.double().square().sum(-1))
    total[rows.sum(-1) == 0] = float("nan")
    return total.T.cpu().numpy()
