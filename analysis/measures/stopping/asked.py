"""Measures of stopping as they are asked of a case: records of full trajectories, rules at chosen thresholds."""

from dataclasses import asdict, fields, replace
from typing import Any

import pandas as pd

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.stopping import frontier as frontiers
from loopmdm.analysis.measures.stopping import record
from loopmdm.analysis.measures.stopping.predictor import feature_rules, prediction_quality, predictor_frontier
from loopmdm.analysis.measures.stopping.record import LoopRecord, record_loops, rule_name
from loopmdm.analysis.measures.stopping.sampling import stopping_in_sampling, usage_by_step
from loopmdm.analysis.measures.stopping.steps import loops_against_steps
from loopmdm.analysis.measures.stopping.usage import loop_usage
from loopmdm.analysis.measures.stopping.verdicts import calibration, noninferiority, usefulness
from loopmdm.model.flops import forward_flops
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.stopping.rules import StateDelta, StoppingRule
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS

CLUES = 16
"""Cells of 36 that are given where a sampling run starts from puzzles."""


def records(case: Case, rules: list | None = None) -> tuple[LoopRecord, LoopRecord]:
    """Every sequence run to the end, on test and on validation."""
    options = {"max_loops": case.n_loops, "rules": rules}
    test = record_loops(case.m, case.sequences, seed=case.seed, **options)
    held_out = case.share(replace(case.validation.sequences.rows(slice(case.n)), clusters=None))
    return test, record_loops(case.m, held_out, seed=case.seed + 1, **options)


def frontier(case: Case, n_thresholds: int = 20) -> pd.DataFrame:
    """All rules by replay, the fitted schedule, the oracle and fixed S."""
    return frontiers.frontier(*records(case), n_thresholds)


def causal_frontier(case: Case, _: MaskedBatch, n_thresholds: int = 20) -> pd.DataFrame:
    """The same of a causal model, on its next tokens; there are no mask ratios to tell apart."""
    if not case.m.facts.causal:
        case.m.facts.need("masks", by="stopping-frontier")
    frame = frontier(case, n_thresholds)
    return frame[frame["mask_ratio"].isna()].reset_index(drop=True)


def verdicts(case: Case, n_thresholds: int = 20) -> pd.DataFrame:
    """Non-inferiority and usefulness of every rule, and the use of a schedule by mask ratio, a row each."""
    test, validation = records(case)
    bounds = [noninferiority(test, validation, rule, n_thresholds=n_thresholds) for rule in test.rules]
    useful = usefulness(test, validation, n_thresholds, schedule=True).rename(
        columns={
            "verdict": "useful",
            "threshold": "useful_threshold",
            "mean_loops": "useful_loops",
            "n": "useful_n",
        }
    )
    return pd.DataFrame(bounds).merge(useful, on="rule", how="right", validate="1:1")


def calibrations(case: Case) -> pd.DataFrame:
    """Criterion against the gain still to come, all rules."""
    test, _ = records(case)
    return pd.concat([calibration(test, rule) for rule in test.rules], ignore_index=True)


def state_rule(case: Case, n_thresholds: int) -> StateDelta:
    """State-delta at the middle one of `n_thresholds` over its range on the test set's first loops."""
    test, _ = records(case, [StateDelta(max_loops=case.n_loops, positions="masked")])
    middle = frontiers.thresholds(test, "state-delta", n_thresholds)
    return StateDelta(middle[len(middle) // 2], max_loops=case.n_loops, positions="masked")


def usage(case: Case, n_thresholds: int = 20) -> pd.DataFrame:
    """Loops under state-delta at its middle threshold, by mask ratio, difficulty, token class; both scopes."""
    return loop_usage(case.m, case.sequences, state_rule(case, n_thresholds), seed=case.seed)


def start(case: Case, n_clues: int, steps: int) -> dict[str, Any]:
    """What sampling starts from: puzzles of `n_clues` in 36 on Sudoku, a cell a step; else all masked."""
    board = BOARDS.get(case.test.task)
    if board is None:
        return {"clues": case.masked(1.0), "steps": steps}
    clues = puzzles(board, case.tokens, round(n_clues / 36 * board.n_cells), False, case.seed)
    return {"clues": clues, "board": board, "steps": int(clues.masked[0].sum())}


def sampling(case: Case, n_thresholds: int = 20, n_clues: int = CLUES, steps: int = 32) -> pd.DataFrame:
    """Sampling end to end with state-delta in both scopes, beside fixed S."""
    rule = state_rule(case, n_thresholds)
    token = StateDelta(rule.threshold, max_loops=case.n_loops, positions="masked", scope="token")
    given = start(case, n_clues, steps)
    return stopping_in_sampling(case.m, [rule, token], max_loops=case.n_loops, seed=case.seed, **given)


def by_step(case: Case, n_thresholds: int = 20, n_clues: int = CLUES, steps: int = 32) -> pd.DataFrame:
    """Loops used along a sampling run under state-delta at its middle threshold."""
    given = start(case, n_clues, steps)
    given.pop("board", None)
    return usage_by_step(case.m, state_rule(case, n_thresholds), seed=case.seed, **given)


def predicted(case: Case, n_thresholds: int = 20) -> pd.DataFrame:
    """Frontier of stopping by a predicted remaining gain."""
    return predictor_frontier(*records(case, feature_rules(case.n_loops)), n_thresholds)


def foresight(case: Case) -> pd.DataFrame:
    """How well the remaining gain is predicted."""
    return prediction_quality(*records(case, feature_rules(case.n_loops)))


def loops_or_steps(case: Case, budgets: tuple[int, ...] = (2, 4, 8, 16), n_clues: int = CLUES) -> pd.DataFrame:
    """Loops against denoising steps at the FLOPs of S_max loops in each of `budgets` steps."""
    given = start(case, n_clues, 1)
    given.pop("steps")
    length = case.tokens.shape[1]
    flops = [steps * forward_flops(case.m.cfg, length, float(case.n_loops)) for steps in budgets]
    counts = sorted({1, 2, max(1, case.n_loops // 2), case.n_loops})
    return loops_against_steps(case.m, None, flops, counts, test=case.sequences, seed=case.seed, **given)


def _told(rules: list[StoppingRule]) -> list[str]:
    """Each rule by name, with the settings that are not its usual ones."""
    told = []
    for rule in rules:
        usual = {item.name: item.default for item in fields(rule)}
        given = {name: value for name, value in asdict(rule).items() if value != usual[name]}
        told.append(f"{rule_name(rule)} {sorted(given.items())}")
    return told


def _rules() -> list[str]:
    """What rules are tried by default."""
    return _told(record.default_rules(2))


def _features() -> list[str]:
    """What the predictor of the remaining gain looks at."""
    return _told(feature_rules(2))


MEASURES = (
    Measure(
        "stopping-frontier",
        "quality against FLOPs of all rules, with controls",
        frontier,
        "test set",
        loops=2,
        groupless=causal_frontier,
        goes_by=_rules,
        shards=True,
    ),
    Measure(
        "stopping-verdicts",
        "non-inferiority, and usefulness beside the controls, of every rule",
        verdicts,
        "test set",
        loops=2,
        goes_by=_rules,
        shards=True,
    ),
    Measure(
        "stopping-calibration",
        "criterion of each rule against the gain still to come",
        calibrations,
        "test set",
        loops=2,
        goes_by=_rules,
        shards=True,
    ),
    Measure("stopping-usage", "loops used by mask ratio, difficulty and token class", usage, "test set", loops=2),
    Measure("stopping-by-step", "loops used along a sampling run", by_step, "test set", samples=True, loops=2),
    Measure(
        "stopping-in-sampling",
        "quality, FLOPs and time of whole sampling runs",
        sampling,
        "test set",
        samples=True,
        loops=2,
    ),
    Measure(
        "gain-predictor",
        "frontier of stopping by a predicted remaining gain",
        predicted,
        "test set",
        loops=2,
        goes_by=_features,
    ),
    Measure(
        "gain-foresight",
        "how well the remaining gain is predicted",
        foresight,
        "test set",
        loops=2,
        goes_by=_features,
    ),
    Measure(
        "loops-or-steps",
        "loops against denoising steps at equal FLOPs",
        loops_or_steps,
        "test set",
        samples=True,
        loops=2,
    ),
)
