"""Effects of interventions on the NELBO, paired by sequence and mask, with intervals."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions.contexts import cut, stale
from loopmdm.analysis.measures.interventions.places import Chosen, Loops
from loopmdm.analysis.measures.quality.decomposition import noise_bins
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.likelihood import Read, estimates_after, losses_after, row_sums
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import Sequences

CONTROLS = (("masked->masked", False), ("masked->clean", False), ("masked->masked", True), ("stale", False))
"""Edges cut, and whether random edges of equal mass and distance take their place; "stale" cuts none, but feeds
masked keys' values of loop 0."""


def mediated_share(
    m: HookedLoopMDM,
    tokens: Tensor | Sequences,
    n_loops: int | None = None,
    arms: Sequence[tuple[str, bool]] = CONTROLS,
    loops: Loops = None,
    layers: Chosen = None,
    heads: Chosen = None,
    n_samples: int = 2,
    maskable: Tensor | None = None,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """How much of the gain of looping goes through some edges: share = 1 - gain_cut / gain_intact.

    `arms`: edges as `cut` takes them and whether `matched` random ones are cut in their place, or "stale".

    gain = NELBO at S = 1 less NELBO at S = n_loops, each arm by its own S = 1; both arms on the explicit attention
    path, with the same sequences and masks. 0: the gain survives the cut; 1: nothing of it is left; below 0 it
    grows. `share` has the 95% interval `low`..`high` (delta method, Student's t over sequences or `clusters`); it
    is NaN where the intact gain is not above 0 beyond its error: no gain, nothing to mediate.

    Columns: edges matched n_loops gain_intact gain_intact_se gain gain_se share share_se low high n.
    """
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    if n_loops < 2:
        raise UsageError("a gain of looping needs n_loops of at least 2")
    sequences = Sequences.of(tokens, maskable, clusters=clusters).clean_for(m)
    read, clusters = Read(n_samples=n_samples, seed=seed, batch_size=batch_size), sequences.clusters

    def gains(arm: AbstractContextManager) -> tuple[np.ndarray, np.ndarray]:
        with arm:
            once, often = estimates_after(m, sequences, [1, n_loops], read)
        return (once.per_sequence - often.per_sequence).numpy(), once.lengths.double().numpy()

    intact, weights = gains(cut(m, "none", loops, layers, heads))
    whole, whole_se, n = stats.weighted_mean_and_error(intact, weights, clusters)
    half = stats.t95(stats.count_units(int(n), clusters))
    rows = []
    for what, matched in arms:
        arm = _stale(m, loops, layers) if what == "stale" else cut(m, what, loops, layers, heads, matched, seed)
        kept, _ = gains(arm)
        left, left_se, _ = stats.weighted_mean_and_error(kept, weights, clusters)
        share, error = share_of_gain(intact, kept, weights, clusters)
        rows.append((what, matched, n_loops, float(whole), float(whole_se), float(left), float(left_se), share,
                     error, share - half * error, share + half * error, int(n)))  # fmt: skip
    columns = ["edges", "matched", "n_loops", "gain_intact", "gain_intact_se", "gain", "gain_se", "share",
               "share_se", "low", "high", "n"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


@contextmanager
def _stale(m: HookedLoopMDM, loops: Loops, layers: Chosen) -> Iterator[HookedLoopMDM]:
    """`stale` on the explicit attention path of all arms."""
    with cut(m, "none"), stale(m, "masked", loops, layers):
        yield m


def share_of_gain(
    intact: np.ndarray, kept: np.ndarray, weights: np.ndarray, clusters: np.ndarray | None = None
) -> tuple[float, float]:
    """1 - mean kept gain / mean intact gain, and its error; NaN where the intact gain may be 0."""
    whole, whole_se, _ = stats.weighted_mean_and_error(intact, weights, clusters)
    left, _, _ = stats.weighted_mean_and_error(kept, weights, clusters)
    if not whole > stats.Z95 * whole_se:
        return float("nan"), float("nan")
    influence = (kept - left / whole * intact) / whole * weights / weights[np.isfinite(intact)].mean()
    return float(1 - left / whole), float(stats.influence_error(influence, clusters))


@torch.no_grad()
def effect_by_loop(
    m: HookedLoopMDM,
    tokens: Tensor | Sequences,
    intervention: Callable[[Loops], AbstractContextManager],
    n_loops: int | None = None,
    onward: bool = False,
    n_bins: int = 4,
    n_samples: int = 2,
    maskable: Tensor | None = None,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """What an intervention at loop i alone (`onward`: from i on) does to the NELBO at n_loops, by mask ratio.

    `intervention` makes the context for some loops, as in `lambda loops: cut(m, "masked->masked", loops)`.
    `effect` is NELBO with less NELBO without, nats per masked token, paired; above 0 it hurts. Bins without masks
    are NaN with n = 0. Columns: loop onward mask_ratio effect effect_se nelbo n.
    """
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    check_count("n_bins", n_bins)
    sequences = Sequences.of(tokens, maskable, clusters=clusters).clean_for(m)
    read, clusters = Read(n_samples=n_samples, seed=seed, batch_size=batch_size), sequences.clusters

    def losses(arm: AbstractContextManager) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss [sequence, bin] at the last loop, NaN where no mask fell into the bin; number of masks."""
        total, number = np.zeros((2, len(sequences), n_bins))
        with arm:
            for span, part, values in losses_after(m, sequences, [n_loops], read):
                counts = part.masked.sum(-1)
                place = noise_bins(counts, part.sequences.lengths, n_bins)
                index = np.arange(len(sequences))[span], place.cpu().numpy()
                np.add.at(total, index, (row_sums(values[0], part) / counts).cpu().numpy())
                np.add.at(number, index, 1)
        with np.errstate(invalid="ignore"):
            return total / number, number

    without, _ = losses(cut(m, "none"))
    level, _, _ = stats.mean_and_error(without, clusters)
    rows = []
    for loop in range(n_loops):
        changed, _ = losses(intervention(slice(loop, None) if onward else loop))
        effect, error, n = stats.mean_and_error(changed - without, clusters)
        for place in range(n_bins):
            rows.append((loop, onward, (place + 0.5) / n_bins, float(effect[place]), float(error[place]),
                         float(level[place]), int(n[place])))  # fmt: skip
    return pd.DataFrame(rows, columns=["loop", "onward", "mask_ratio", "effect", "effect_se", "nelbo", "n"])


def on_tests(case: Case) -> pd.DataFrame:
    """Share of the gain of looping lost by cuts, their controls, and stale values."""
    return mediated_share(case.m, case.sequences, case.n_loops, seed=case.seed)


def at_each_loop(make: Callable) -> Callable[[Case], pd.DataFrame]:
    """Effect of an intervention at each loop alone and from it on, by mask ratio."""

    def run(case: Case) -> pd.DataFrame:
        parts = [
            effect_by_loop(
                case.m, case.sequences, lambda loops: make(case.m, loops), case.n_loops, onward, seed=case.seed
            )
            for onward in (False, True)
        ]
        return pd.concat(parts, ignore_index=True)

    return run


MEASURES = (
    Measure("mediated-share", "share of the gain of looping that some edges carry", on_tests, "test set", loops=2),
    Measure(
        "cut-effects",
        "NELBO lost by cutting masked-to-masked at or from a loop on",
        at_each_loop(lambda m, loops: cut(m, "masked->masked", loops)),
        "test set",
        loops=2,
        shards=True,
    ),
    Measure(
        "stale-effects",
        "NELBO lost where masked keys keep the values of loop 0",
        at_each_loop(lambda m, loops: stale(m, "masked", loops)),
        "test set",
        loops=2,
        shards=True,
    ),
)
