"""The specification curve of "masked-to-masked attention rises with loops", under every reasonable definition.

One specification is one choice of each, of the masked queries of looped layers; the estimate is last loop - first:

    measure   mass | lift | log_odds | content | toggle            self   in | out (where a mass may hold it)
    sinks     in | out (a group of its own, chosen on other sequences at `factor`)
    heads     average | content (heads weighted by the content they move between masked positions) | growth (the
              head whose log-odds grow most on one half of the sequences, measured on the other)
    layer     each looped layer, or all averaged            mask_ratio   one batch each

Masses are averaged over heads and layers before anything is divided. toggle knows neither self nor sinks: its keys
are compared with themselves; content of one's own key is 0. Intervals are 95%, by Student's t over sequences or
clusters (delta method; head weights count as given): they say what holds for this model on other sequences. An
untrained model rises or falls by the accident of its weights, so read its curve beside (and `effect_tests`). A
curve that crosses 0 says that the claim hangs on the definition. Definitions are ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from loopmdm.analysis.measures.attention.record import LoopRecord, check_loops, log_odds_growth, record
from loopmdm.analysis.measures.attention.sinks import halves, received_attention
from loopmdm.analysis.measures.attention.toggle import Keys, toggled
from loopmdm.analysis.measures.registry import Measure, plain
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.sites import at

MEASURES = ("mass", "lift", "log_odds", "content", "toggle")
HEADS = ("average", "content", "growth")


@dataclass(frozen=True)
class Evidence:
    """All that specifications are made of, per sequence at the first and last loop of the looped layers.

    `plain` and `apart` hold key groups with sinks in and out, `toggle` [sequence, loop, layer, head];
    `clusters` [sequence] or None; `first` [sequence] marks the half that chooses the growing head.
    """

    plain: LoopRecord
    apart: LoopRecord
    toggle: NDArray
    clusters: NDArray | None
    first: NDArray


def specification_curve(
    m: HookedLoopMDM,
    b: MaskedBatch | Sequence[MaskedBatch],
    n_loops: int | None = None,
    factor: float = 5.0,
    n_keys: int = 2,
    clusters: NDArray | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per specification: does masked-to-masked rise from the first to the last loop?

    `b`: a batch, or one a mask ratio (of the same sequences, if `clusters` are given). Columns: n_loops mask_ratio
    measure self sinks heads layers (one | all) layer head (missing where averaged) estimate standard_error low
    high verdict n. With heads = growth, layer and head are the chosen ones and n counts the half that measures.
    `verdict` is rises | falls | undecided by the interval, undefined if there is none (NaN). Units differ between
    measures: compare signs, and sizes within a measure.
    """
    n_loops = check_loops(m, n_loops)
    batches = [b] if isinstance(b, MaskedBatch) else list(b)
    if not batches:
        raise UsageError("no batch is given; make one with m.mask(text, ratio=.5)")
    choices, rows = Choices(factor, n_keys, batch_size, seed), []
    for batch in batches:
        evidence = gather(m, as_batch("specification_curve", batch, clusters), n_loops, choices)
        for row in _specifications(evidence, m.cfg.n_prelude_layers):
            rows.append({"n_loops": n_loops, "mask_ratio": batch.mask_ratio} | row)
    frame = pd.DataFrame(rows)
    return frame.astype({"layer": "Int64", "head": "Int64"})


@dataclass(frozen=True)
class Choices:
    """How evidence is gathered: the sinks' `factor`, toggled keys a sequence, sequences at a time, seed."""

    factor: float
    n_keys: int
    batch_size: int
    seed: int


@torch.no_grad()
def gather(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, choices: Choices) -> Evidence:
    """Run the model: group masses and contents with sinks in and out, and toggles, at the first and last loop."""
    loops, batch_size = (0, n_loops - 1), choices.batch_size
    first = halves(b.owners, choices.seed)
    plain = record(m, b, loops, content=True, batch_size=batch_size)
    parts, places = [], []
    for half in (first, ~first):
        index = torch.from_numpy(half)
        sinks = received_attention(m, b.rows(~index), n_loops, batch_size, loops).sinks(choices.factor)
        parts.append(record(m, b.rows(index), loops, sinks.groups, True, batch_size))
        places.append(np.flatnonzero(half))
    order = np.argsort(np.concatenate(places))
    mass, chance, content = (
        np.concatenate([getattr(part, name) for part in parts])[order] for name in ("mass", "chance", "content")
    )
    apart = LoopRecord(mass, chance, content, parts[0].names)
    return Evidence(plain, apart, _toggles(m, b, n_loops, choices), b.clusters, first)


def _toggles(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, choices: Choices) -> NDArray:
    loops, parts = (0, n_loops - 1), []
    for start, part in b.batches(choices.batch_size):
        found = toggled(m, part, n_loops, Keys(choices.n_keys, choices.seed, start), at(loop=loops))
        grid = [[found[f"loop.{loop}.blocks.{layer}."] for layer in m.cfg.layers("loop")] for loop in loops]
        pairs = torch.stack([torch.stack(row) for row in grid]).double().nanmean(dim=4)
        parts.append((pairs[..., 0] - pairs[..., 1]).permute(2, 0, 1, 3).cpu().numpy())
    return np.concatenate(parts)


def _specifications(evidence: Evidence, first_layer: int) -> Iterator[dict]:
    n_layers = evidence.toggle.shape[2]
    scopes = {"one": [[at] for at in range(n_layers)], "all": [list(range(n_layers))]}
    for layers in scopes if n_layers > 1 else ("one",):
        for chosen, heads in product(scopes[layers], HEADS):
            weights, kept, best = _weights(evidence, chosen, heads)
            labels = None if evidence.clusters is None else evidence.clusters[kept]
            place = {"layer": first_layer + chosen[0] if layers == "one" else None, "head": None}
            if best is not None:
                place = {"layer": first_layer + best[0], "head": best[1]}
            for choice in _choices():
                value, influence = _growth(evidence, choice, weights, kept)
                scope = dict(zip(("measure", "self", "sinks"), choice, strict=True))
                yield scope | {"heads": heads, "layers": layers} | place | _interval(value, influence, labels)


def _choices() -> Iterator[tuple[str, str, str]]:
    """(measure, self, sinks) that mean something."""
    yield from product(("mass", "lift", "log_odds"), ("in", "out"), ("in", "out"))
    yield from product(("content",), ("out",), ("in", "out"))
    yield "toggle", "out", "in"


def _weights(evidence: Evidence, layers: list[int], heads: str) -> tuple[NDArray, NDArray, tuple[int, int] | None]:
    """Weights [layer, head] that sum to 1, the sequences to measure on, and the one head chosen if it is one."""
    shape, every = evidence.toggle.shape[2:], np.ones(len(evidence.toggle), dtype=bool)
    inside = np.zeros(shape)
    inside[layers] = 1.0
    if heads == "average":
        return inside / inside.sum(), every, None
    masked, clean = evidence.plain.at("masked"), evidence.plain.at("clean")
    if heads == "content":
        assert evidence.plain.content is not None
        content = stats.mean_and_error(evidence.plain.content[..., masked])[0].mean(axis=0) * inside
        with np.errstate(invalid="ignore"):
            return content / content.sum(), every, None
    mass = evidence.plain.mass[evidence.first]
    growth = log_odds_growth(mass[..., masked], mass[..., clean])[0]
    growth = np.where((inside > 0) & np.isfinite(growth), growth, -np.inf)
    best = np.unravel_index(int(growth.argmax()), shape)
    only = np.zeros(shape)
    only[best] = 1.0 if np.isfinite(growth[best]) else np.nan
    return only, ~evidence.first, (int(best[0]), int(best[1]))


def _growth(
    evidence: Evidence, choice: tuple[str, str, str], weights: NDArray, kept: NDArray
) -> tuple[float, NDArray]:
    """Last less first of one (measure, self, sinks), and each sequence's influence on it."""
    measure, inside, sinks = choice
    groups = evidence.plain if sinks == "in" else evidence.apart
    pooled = lambda values: (values[kept] * weights).sum(axis=(2, 3))  # noqa: E731  [sequence, loop]
    masked, clean, own = groups.at("masked"), groups.at("clean"), groups.at("self")
    if measure == "toggle":
        return _difference(pooled(evidence.toggle))
    if measure == "content":
        assert groups.content is not None
        return _difference(pooled(groups.content[..., masked]))
    mass, chance = pooled(groups.mass[..., masked]), pooled(groups.chance[..., masked])
    if inside == "in":
        mass, chance = mass + pooled(groups.mass[..., own]), chance + pooled(groups.chance[..., own])
    if measure == "mass":
        return _difference(mass)
    if measure == "lift":
        return _ratio_difference(mass, chance)
    return _log_odds_difference(mass, chance, pooled(groups.mass[..., clean]), pooled(groups.chance[..., clean]))


def _difference(values: NDArray) -> tuple[float, NDArray]:
    change = values[:, 1] - values[:, 0]
    mean = float(stats.mean_and_error(change)[0])
    return mean, change - mean


def _ratio_difference(above: NDArray, below: NDArray) -> tuple[float, NDArray]:
    """Of mean above / mean below, at either loop: chances differ between loops if the sinks do."""
    (top, _, _), (bottom, _, _) = stats.mean_and_error(above), stats.mean_and_error(below)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = top / bottom
        influence = (above - ratio * below) / bottom
    return float(ratio[1] - ratio[0]), influence[:, 1] - influence[:, 0]


def _log_odds_difference(
    above: NDArray, above_chance: NDArray, below: NDArray, below_chance: NDArray
) -> tuple[float, NDArray]:
    """Of log[(above / chance) / (below / chance)].

    `stats.log_ratio` with loops subtracted term by term: its order of sums would move the last digits of tables.
    """
    value, influence = 0.0, np.zeros(len(above))
    for part, sign in ((above, 1), (above_chance, -1), (below, -1), (below_chance, 1)):
        mean = stats.mean_and_error(part)[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            value = value + sign * (np.log(mean[1]) - np.log(mean[0]))
            influence = influence + sign * (part / mean)[:, 1] - sign * (part / mean)[:, 0]
    return float(value), influence


def _interval(value: float, influence: NDArray, clusters: NDArray | None) -> dict:
    """Estimate, error, 95% interval, verdict and n."""
    known = np.isfinite(influence) & np.isfinite(value)
    n = int(known.sum())
    units = n if clusters is None else len(np.unique(clusters[known]))
    if units < 2:
        estimate = value if n and np.isfinite(value) else float("nan")
        empty = dict.fromkeys(("standard_error", "low", "high"), float("nan"))
        return {"estimate": estimate} | empty | {"verdict": "undefined", "n": n}
    error = float(stats.influence_error(influence, clusters))
    low, high = value - stats.t95(units) * error, value + stats.t95(units) * error
    verdict = "rises" if low > 0 else "falls" if high < 0 else "undecided"
    row = {"estimate": value, "standard_error": error, "low": low, "high": high}
    return row | {"verdict": verdict, "n": n}


MEASURES = (
    Measure(
        "attention-specifications",
        "sign and size of the rise under every definition",
        plain(specification_curve),
        loops=2,
    ),
)
