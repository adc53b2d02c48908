"""Which heads turn to masked keys as the loops go on: chosen on one half, tested on the other; and a fair null.

    growth = log-odds of masked against clean keys at the last loop less those at the first (masked queries)

`head_growth` ranks heads by growth on one half of the sequences and tests growth > 0 on the other, one-sided, with
Holm's correction over the heads tested.

`effect_tests` asks for more. An untrained model has one fixed [MASK] embedding and fixed weights: its heads come
to prefer (or avoid) masked keys by accident of that draw, alike in all sequences, so a test over sequences alone
calls far more of its heads than its level. Chance lies in the draw, not in the sequences. Hence the *matched
mark*: a random direction of the [MASK] embedding's own length, put at the masked positions instead of it.
Untrained embeddings are isotropic, so given its length [MASK] is one such direction: with R random marks

    p_mark = (1 + #{growth with a mark >= growth with [MASK]}) / (1 + R)

is exact there, on the same sequences and at any vocabulary. (A random relabelling of masked and clean keys is no
such null: labels that attention cannot know give log-odds of 0 in both loops, and the accident stays.) An effect
is called if both p_mark and the paired test over sequences are small: p_value is the larger of the two. In a
trained model it says that what was learned of [MASK] matters, beyond what any repeated vector there would get.
`head_growth` has no such null: it says what holds for this model on other sequences. Definitions are ours.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from loopmdm.analysis.measures.attention.record import check_loops, log_odds_growth, record
from loopmdm.analysis.measures.attention.sinks import halves
from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.numbers.contrasts import holm
from loopmdm.model.batching import size_of_batches
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import step_generator
from loopmdm.model.sequences import MaskedBatch, as_batch


def one_sided(value: NDArray, error: NDArray, units: NDArray) -> NDArray:
    """P(T >= value / error) by Student's t over independent units; NaN where there is no error."""
    from scipy import stats as distributions  # late: half a second

    with np.errstate(invalid="ignore", divide="ignore"):
        p = distributions.t.sf(value / error, np.maximum(units - 1, 1))
    return np.where((error == 0) & (value == 0), 1.0, np.where(np.isfinite(error), p, np.nan))


def growth_and_error(
    mass: NDArray, clusters: NDArray | None, by_head: bool = True
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Growth, error, independent units and n [layer, head] of masses [sequence, loop, layer, head, group]."""
    mass = mass if by_head else mass.mean(axis=3, keepdims=True)
    value, influence = log_odds_growth(mass[..., 1], mass[..., 2])
    known = np.isfinite(influence)
    labels = np.arange(len(mass)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    held = np.zeros((int(labels.max()) + 1, *known.shape[1:]), dtype=bool)
    np.logical_or.at(held, labels, known)
    return value, stats.influence_error(influence, clusters), held.sum(axis=0), known.sum(axis=0)


def head_growth(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    top: int | None = None,
    clusters: NDArray | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Heads of the looped layers by growth on one half; the `top` of them (default: all) tested on the other.

    Columns: n_loops layer head rank mask_ratio growth_ranked (the half that ranks) growth standard_error p_value
    p_holm n n_units (the half that tests), best rank (1) first.
    """
    n_loops = check_loops(m, n_loops)
    b = as_batch("head_growth", b, clusters)
    n_tests = m.cfg.n_loop_layers * m.cfg.n_heads if top is None else check_count("top", top)
    first = halves(b.owners, seed)
    mass = record(m, b, (0, n_loops - 1), batch_size=batch_size).mass
    ranked = growth_and_error(mass[first], b.rows(first).clusters)[0]
    growth, error, units, n = growth_and_error(mass[~first], b.rows(~first).clusters)
    layer, head = (index.ravel() for index in np.indices(growth.shape))
    frame = pd.DataFrame({
        "n_loops": n_loops, "layer": layer + m.cfg.n_prelude_layers, "head": head, "mask_ratio": b.mask_ratio,
        "growth_ranked": ranked.ravel(), "growth": growth.ravel(), "standard_error": error.ravel(),
        "p_value": one_sided(growth, error, units).ravel(), "n": n.ravel(), "n_units": units.ravel(),
    })  # fmt: skip
    frame = frame.sort_values("growth_ranked", ascending=False, na_position="last", kind="stable").head(n_tests)
    frame = frame.reset_index(drop=True)
    frame.insert(3, "rank", np.arange(1, len(frame) + 1))
    frame.insert(frame.columns.get_loc("n"), "p_holm", holm(frame["p_value"].to_numpy()))
    return frame


def random_marks(m: HookedLoopMDM, n_marks: int, seed: int) -> Float[Tensor, "mark d_model"]:
    """Random directions of the [MASK] embedding's length."""
    embedding = m.model.mask_vector.detach()
    noise = step_generator(seed, "order", 2).standard_normal((n_marks, m.cfg.d_model))
    directions = torch.from_numpy(noise / np.linalg.norm(noise, axis=1, keepdims=True)).to(embedding)
    return directions * embedding.norm()


def marked_masses(
    m: HookedLoopMDM, b: MaskedBatch, n_loops: int, marks: Float[Tensor, "mark d_model"], batch_size: int
) -> NDArray:
    """As `record`'s masses at the first and last loop with each mark embedded at masked positions: [mark, ..].

    Pairs of a mark and a sequence run together, `batch_size` at a time.
    """
    parts, n_pairs, size = [], len(marks) * len(b), size_of_batches(batch_size)
    for start in range(0, n_pairs, size):
        pairs = torch.arange(start, min(start + size, n_pairs), device=b.tokens.device)
        part = b.rows(pairs % len(b))
        # The embedding runs before the model's context is set: what is masked comes from the batch itself.
        masked = (part.tokens == m.cfg.mask_token_id)[..., None]
        put = partial(_put, masked=masked, mark=marks[pairs // len(b)][:, None])
        with m.hooks([("hook_embed", put)]):
            parts.append(record(m, part, (0, n_loops - 1), batch_size=batch_size).mass)
    whole = np.concatenate(parts)
    return whole.reshape(len(marks), len(b), *whole.shape[1:])


def _put(embedded: Tensor, hook: object, masked: Tensor, mark: Tensor) -> Tensor:  # noqa: ARG001
    return torch.where(masked, mark, embedded)


@torch.no_grad()
def effect_tests(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    n_marks: int = 39,
    level: float = 0.05,
    clusters: NDArray | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Does masked-to-masked rise with loops beyond chance? One test a looped layer and head, one a layer.

    Columns: n_loops layer head (missing: heads averaged) mask_ratio growth standard_error p_sequences null_mean
    null_high (95% quantile of growth with random marks) p_mark p_value effect n. `effect` is p_value <= level, for
    each test alone: where many are read together, correct with `holm`. It takes 1 + n_marks forwards without coda;
    the smallest possible p_mark is 1 / (1 + n_marks).
    """
    n_loops = check_loops(m, n_loops)
    b = as_batch("effect_tests", b, clusters)
    if not 0 < level < 1 or check_count("n_marks", n_marks) + 1 < 1 / level:
        raise UsageError(f"n_marks = {n_marks} cannot reach level {level}; give at least 1 / level - 1 marks")
    mass = record(m, b, (0, n_loops - 1), batch_size=batch_size).mass
    marked = marked_masses(m, b, n_loops, random_marks(m, n_marks, seed), batch_size)
    frames = []
    for by_head in (True, False):
        growth, error, units, n = growth_and_error(mass, b.clusters, by_head)
        null = np.stack([growth_and_error(one, b.clusters, by_head)[0] for one in marked])
        p_sequences = one_sided(growth, error, units)
        beaten = (~(null < growth)).sum(axis=0)  # what is not known counts against the effect
        p_mark = np.where(np.isfinite(growth), (1 + beaten) / (1 + n_marks), np.nan)
        p_value = np.maximum(p_sequences, p_mark)
        layer, head = (index.ravel() for index in np.indices(growth.shape))
        columns = {"growth": growth, "standard_error": error, "p_sequences": p_sequences}
        columns |= {"null_mean": null.mean(axis=0), "null_high": np.quantile(null, 0.95, axis=0)}
        columns |= {"p_mark": p_mark, "p_value": p_value, "effect": p_value <= level, "n": n}
        place = {"n_loops": n_loops, "layer": layer + m.cfg.n_prelude_layers}
        place |= {"head": pd.array(head if by_head else [None] * len(head), dtype="Int64")}
        flat = {name: value.ravel() for name, value in columns.items()}
        frames.append(pd.DataFrame(place | {"mask_ratio": b.mask_ratio} | flat))
    return pd.concat(frames, ignore_index=True)


MEASURES = (
    Measure(
        "attention-heads", "heads ranked by growth on one half, tested on the other", plain(head_growth), loops=2
    ),
    Measure(
        "attention-tests", "does masked-to-masked rise with loops, head by head", plain(effect_tests), loops=2
    ),
)
