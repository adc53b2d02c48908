"""What edges carry, in nats: they are cut, or what they carry is replaced, with the first loops left intact.

Every arm acts in loops `first`, first + 1, .. of the looped layers only, so all arms share the model at S = first.
One mask a sequence in each of `n_bins` strata of the mask ratio; their mean is the NELBO. An effect is the loss
with less the loss without, at S = n_loops, paired by sequence and mask; above 0 it hurts.

    kind       cut: attention to the edges is forbidden, their mass goes to the other keys
               resample: keys hand on another sequence's values under the same mask; pattern, mass, scale are kept
               mean: the mean of such values over `n_draws` draws of other sequences
    edges      masked->masked; clean->masked (a relay's first half); any->masked (both: masked keys are hidden from
               all other queries); masked->clean. By relation on boards. A random share: dose and response.
    side       within, outside: random ones of these edges, and of all others of the same queries, with equal mass:
               what the edges cost, and their control
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions.contexts import cut
from loopmdm.analysis.measures.interventions.places import applications
from loopmdm.analysis.measures.interventions.selections import RELATIONS, Draw, EdgeSet, choice
from loopmdm.analysis.measures.interventions.values import (
    Values,
    donors,
    mean_values,
    record_values,
    replace_values,
)
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.groups import members
from loopmdm.model.context import Context
from loopmdm.model.diffusion.likelihood import Read, draws, row_cross_entropy, row_sums
from loopmdm.model.errors import UsageError, check_count, check_model, unknown_name
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch, Sequences
from loopmdm.model.tasks.sudoku import board_of_model

Kind = Literal["cut", "resample", "mean"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EDGE_GROUPS = ("masked->masked", "clean->masked", "any->masked", "masked->clean")
SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Arm:
    """What is done to which edges."""

    kind: Kind
    edges: EdgeSet

    def __post_init__(self):
        """A known kind."""
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise unknown_name("kind of intervention", self.kind, KINDS)


@dataclass(frozen=True)
class Trial:
    """How arms are tried: in loops `first` .. n_loops - 1 (None: S_max), masks, draws, seed.

    `n_draws`: of cut edges of equal mass, and of other sequences in a mean; `n_resamples`: of resampled values,
    and of edges of equal mass that get other values. Shares are drawn once: each sequence has its own edges.
    """

    n_loops: int | None = None
    first: int = 1
    n_bins: int = 4
    n_draws: int = 10
    n_resamples: int = 2
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self):
        """Counts are counts."""
        for name in ("first", "n_bins", "n_draws", "n_resamples", "batch_size"):
            check_count(name, getattr(self, name))

    def draws_of(self, arm: Arm) -> int:
        """How often an arm is drawn."""
        balanced = arm.edges.side != "all"
        if arm.kind == "cut":
            return self.n_draws if balanced else 1
        return min(self.n_resamples, self.n_draws) if balanced or arm.kind == "resample" else 1

    def loops_of(self, m: HookedLoopMDM) -> int:
        """S, checked: some loop follows the intact ones."""
        n_loops = check_count("n_loops", m.cfg.max_loops if self.n_loops is None else self.n_loops)
        if n_loops <= self.first:
            raise UsageError(f"n_loops must exceed the {self.first} intact loops, got {n_loops}")
        return n_loops


def standard_arms(m: HookedLoopMDM, kinds: Sequence[str] = KINDS) -> list[Arm]:
    """Each of `kinds` on: the four groups; of masked->masked both sides, shares and, on a board, relations."""
    relations = RELATIONS if board_of_model(m.cfg) else ()
    chosen = [EdgeSet(groups) for groups in EDGE_GROUPS] + [EdgeSet(side=side) for side in ("within", "outside")]
    chosen += [EdgeSet(share=share) for share in SHARES] + [EdgeSet(relation=name) for name in relations]
    return [Arm(kind, edges) for edges in chosen for kind in cast(Sequence[Kind], kinds)]


@torch.no_grad()
def causal_effects(
    m: HookedLoopMDM, tokens: Tensor | Sequences, arms: Sequence[Arm] | None = None, trial: Trial | None = None
) -> pd.DataFrame:
    """Effects of arms (default `standard_arms`), a row for each mask ratio and one for their mean, the NELBO.

    Columns: kind edges relation share side; mask_ratio (a bin's middle; NaN: the mean over bins), n_loops, first;
    effect, effect_se, draw_sd (of the mean effect, over draws); excess, excess_se: on side "within" the effect
    less that "outside"; nelbo (intact); mass (attention that a query of the group gives the edges when intact,
    mean over heads and the loops in question); n sequences; n_draws. Nats per masked token; errors are over
    sequences or documents, and over draws. The kind "one loop" is S = 1 in place of S = n_loops: the gain of
    looping.
    """
    check_model(m, "causal_effects", hooked=True)
    trial = Trial() if trial is None else trial
    if not isinstance(trial, Trial):
        raise UsageError(f"trial must be a Trial, got {trial!r:.60}")
    listed = isinstance(arms, Sequence) and all(isinstance(arm, Arm) for arm in arms)
    if arms is not None and not listed:
        raise UsageError(f"arms must be a list of Arm, got {arms!r:.60}")
    study = _Study(m, Sequences.of(tokens).clean_for(m), list(arms or standard_arms(m)), trial)
    for place, (batch, _) in enumerate(draws(m, study.sequences, study.read)):
        study.look(place, batch)
        study.act(place, batch)
    return study.frame()


class _Study:
    """Losses [bin, draw, sequence] by arm, filled bin by bin."""

    def __init__(self, m: HookedLoopMDM, sequences: Sequences, arms: list[Arm], trial: Trial):
        self.m, self.sequences, self.arms, self.trial = m, sequences, arms, trial
        self.n_loops, n = trial.loops_of(m), len(sequences)
        self.read = Read(n_samples=trial.n_bins, seed=trial.seed, batch_size=trial.batch_size)
        self.losses = {arm: np.full((trial.n_bins, trial.draws_of(arm), n), np.nan) for arm in arms}
        self.intact, self.once = np.full((2, trial.n_bins, n), np.nan)
        self.sets = list(dict.fromkeys(arm.edges for arm in arms))
        self.mass = {edges: np.full(trial.n_bins, np.nan) for edges in self.sets}
        self.start: dict[int, tuple[Tensor, Context]] = {}

    # --- running ---

    def look(self, place: int, batch: MaskedBatch) -> None:
        """The intact run: losses and masses; keeps the states that arms start from."""
        weights = {edges: _Mass() for edges in self.sets}
        for start, part in batch.batches(self.trial.batch_size):
            span = slice(start, start + len(part))
            with self.m.attention_path("eager"):
                states = list(self.m.states(part.tokens, self.trial.first, part.attention_mask))
                self.once[place, span] = self._read(*states[0], part)
                self.start[start] = states[-1]
                with self._weighing(weights, self._draw(place, 0, start)):
                    self.intact[place, span] = self._onward(start, part)
        for edges, found in weights.items():
            self.mass[edges][place] = found.mean

    def act(self, place: int, batch: MaskedBatch) -> None:
        """All arms, from the intact states on."""
        for start, part in batch.batches(self.trial.batch_size):
            given, mean = self._values(place, start, part)
            for arm in self.arms:
                for number in range(self.trial.draws_of(arm)):
                    values = given[number] if arm.kind == "resample" else mean
                    with self._intervening(arm, self._draw(place, number, start), values):
                        found = self._onward(start, part)
                    self.losses[arm][place, number, start : start + len(part)] = found

    def _onward(self, start: int, part: MaskedBatch) -> np.ndarray:
        """Mean loss of each sequence at S = n_loops, from the intact state on."""
        state, context = self.start[start]
        for loop in range(self.trial.first, self.n_loops):
            state = self.m.loop(state, context, loop)
        return self._read(state, context, part)

    def _read(self, state: Tensor, context: Context, part: MaskedBatch) -> np.ndarray:
        losses = row_cross_entropy(self.m.readout(state, context, rows=part.masked), part)
        return (row_sums(losses, part) / part.masked.sum(-1)).cpu().numpy()

    def _draw(self, place: int, number: int, start: int) -> Draw:
        return Draw(self.trial.seed, place * self.trial.n_draws + number, start)

    @property
    def _loops(self) -> slice:
        return slice(self.trial.first, None)

    def _intervening(self, arm: Arm, draw: Draw, values: Values) -> AbstractContextManager:
        choose = choice(self.m, arm.edges, draw)
        if arm.kind == "cut":
            return cut(self.m, choose, self._loops)
        return replace_values(self.m, values, choose, self._loops)

    def _values(self, place: int, start: int, part: MaskedBatch) -> tuple[list[Values], Values]:
        """Those that arms feed one by one, and the mean of `n_draws`; what no arm asks for is not run."""
        single = max((self.trial.draws_of(arm) for arm in self.arms if arm.kind == "resample"), default=0)
        given = [self._of_others(place, number, start, part) for number in range(single)]
        if not any(arm.kind == "mean" for arm in self.arms):
            return given, {}
        rest = (self._of_others(place, number, start, part) for number in range(single, self.trial.n_draws))
        return given, mean_values(chain(given, rest))

    def _of_others(self, place: int, number: int, start: int, part: MaskedBatch) -> Values:
        """One other sequence's values each, under the masks of `part`."""
        other = donors(self.sequences, self.trial.seed, place * self.trial.n_draws + number)
        clean = self.sequences.tokens[torch.from_numpy(other[start : start + len(part)])]
        tokens = clean.masked_fill(part.masked, self.m.cfg.mask_token_id)
        with self.m.attention_path("eager"):
            return record_values(self.m, tokens, self.n_loops, part.attention_mask, self._loops)

    def _weighing(self, weights: dict, draw: Draw) -> AbstractContextManager:
        pairs = [(choice(self.m, edges, draw), edges, found) for edges, found in weights.items()]

        def weigh(pattern: Tensor, hook: Any) -> None:  # noqa: ARG001
            context = self.m.context
            for choose, edges, found in pairs:
                found.add(pattern, choose(pattern, context), _queries(edges, context))

        return self.m.hooks([(applications(self.m.cfg, self._loops, None, "pattern"), weigh)])

    # --- telling ---

    def frame(self) -> pd.DataFrame:
        """Rows in the order of the arms, the gain of looping first."""
        gain = {"kind": "one loop", "edges": "none", "relation": "any", "share": 1.0, "side": "all"}
        rows = self._rows(gain, (self.once - self.intact)[:, None], None, np.full(self.trial.n_bins, np.nan))
        for arm in self.arms:
            named = {"kind": arm.kind, "edges": arm.edges.groups, "relation": arm.edges.relation}
            named |= {"share": arm.edges.share, "side": arm.edges.side}
            rows += self._rows(named, self._effect(arm), self._excess(arm), self.mass[arm.edges])
        return pd.DataFrame(rows)

    def _effect(self, arm: Arm) -> np.ndarray:
        return self.losses[arm] - self.intact[:, None]

    def _excess(self, arm: Arm) -> np.ndarray | None:
        """The effect within less that outside, draw by draw, if both were tried."""
        outside = Arm(arm.kind, replace(arm.edges, side="outside"))
        if arm.edges.side != "within" or outside not in self.losses:
            return None
        return self.losses[arm] - self.losses[outside]

    def _rows(
        self, named: dict[str, Any], effect: np.ndarray, excess: np.ndarray | None, mass: np.ndarray
    ) -> list[dict[str, Any]]:
        """A row a bin, and one over all bins."""
        n_bins, whole = len(effect), slice(None)
        places = [((place + 0.5) / n_bins, slice(place, place + 1)) for place in range(n_bins)]
        rows = []
        for ratio, bins in [*places, (np.nan, whole)]:
            beyond = np.full((1, 1, effect.shape[-1]), np.nan) if excess is None else excess[bins]
            told = named | {"mask_ratio": ratio, "n_loops": self.n_loops, "first": self.trial.first}
            told |= self._estimate("effect", effect[bins])
            told |= {key: value for key, value in self._estimate("excess", beyond).items() if "excess" in key}
            told["nelbo"] = self._estimate("nelbo", self.intact[bins][:, None])["nelbo"]
            rows.append(told | {"mass": float(mass[bins].mean()), "n_draws": effect.shape[1]})
        return rows

    def _estimate(self, name: str, values: np.ndarray) -> dict[str, Any]:
        """Mean over bins [bin, draw, sequence], then over draws and sequences, with errors of both."""
        weights = self.sequences.lengths.double().cpu().numpy()
        mean, error, spread, n = mean_over_draws(values.mean(0), weights, self.sequences.clusters)
        return {name: mean, f"{name}_se": error, "draw_sd": spread, "n": n}


class _Mass:
    """Attention that queries of a group give to some edges: a sum, and its mean per query and head."""

    def __init__(self):
        self.sum, self.number = 0.0, 0

    def add(self, pattern: Tensor, edges: Tensor, queries: Tensor) -> None:
        self.sum += float((pattern * edges).double().sum())
        self.number += int(queries.sum()) * pattern.shape[1]

    @property
    def mean(self) -> float:
        return self.sum / self.number if self.number else float("nan")


def _queries(edges: EdgeSet, context: Context) -> Tensor:
    group = edges.groups.split("->")[0]
    return members(context.masked, context.real).get(group, context.real)  # of "none" any query


def mean_over_draws(
    values: Float[np.ndarray, "draw batch"], weights: Float[np.ndarray, " batch"], clusters: np.ndarray | None
) -> tuple[float, float, float, int]:
    """Mean over sequences and draws, its error, the spread of single draws' means (NaN for one draw), and n.

    What sequences share in a draw does not average out over them: that part of the variance between draws, beyond
    what each sequence's own noise explains, is added to the error over sequences.
    """
    mean, error, n = stats.weighted_mean_and_error(values.mean(0), weights, clusters)
    if len(values) == 1:
        return float(mean), float(error), float("nan"), int(n)
    by_draw, own, _ = stats.weighted_mean_and_error((values - values.mean(0)).T, weights, clusters)
    spread, draws = np.var(by_draw, ddof=1), len(values)
    shared = max(0.0, float(spread - (own**2).mean() * draws / (draws - 1)))
    return float(mean), float(np.sqrt(error**2 + shared / draws)), float(np.sqrt(spread)), int(n)


def of_case(case: Case, n_draws: int = 10, n_resamples: int = 2, kinds: tuple[str, ...] = KINDS) -> pd.DataFrame:
    """What edges carry in nats, by mask ratio: cuts, resample and mean ablation, controls; loop 0 intact."""
    if not kinds:
        raise UsageError(f"kinds is empty; name some of {', '.join(KINDS)}")
    trial = Trial(case.n_loops, n_draws=n_draws, n_resamples=n_resamples, seed=case.seed)
    return causal_effects(case.m, case.sequences, standard_arms(case.m, kinds), trial)


MEASURES = (
    Measure(
        "causal-edges",
        "nats lost where edges are cut, or carry other values, loop 0 intact",
        of_case,
        "test set",
        loops=2,
    ),
)
