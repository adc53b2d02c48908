"""Measures with their own signatures, as functions of a case and, where they look at masks, a masked batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd
import torch

from loopmdm.analysis.measures import interventions, known, representation, stopping
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions.training_free import training_free
from loopmdm.analysis.measures.stopping.frontier import thresholds
from loopmdm.model.errors import UsageError
from loopmdm.model.flops import forward_flops
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.stopping.rules import StateDelta
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS

RATIOS = (0.25, 0.5, 0.75)
N_THRESHOLDS = 20


def plain(function: Callable[..., pd.DataFrame], **options: object) -> Callable[..., pd.DataFrame]:
    """A measure of the usual signature (m, b, n_loops)."""

    def run(case: Case, b: MaskedBatch) -> pd.DataFrame:
        return function(case.m, b, case.n_loops, **options)

    return run


def looped(run: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """A measure of what several loops do: one loop is refused."""

    def checked(case: Case, *given: MaskedBatch) -> pd.DataFrame:
        if case.n_loops < 2:
            raise UsageError("this measure compares loops; give n_loops of at least 2")
        return run(case, *given)

    return checked


def settled(case: Case, b: MaskedBatch) -> pd.DataFrame:
    """Share of hidden positions settled by each loop."""
    return representation.settled_curve(representation.settled_loops(case.m, b, case.n_loops), b.clusters)


def fixed_points(case: Case, b: MaskedBatch) -> pd.DataFrame:
    """Of 16 sequences: Arnoldi on Jacobian-vector products takes a second or so a sequence."""
    few = b.rows(torch.linspace(0, len(b) - 1, min(16, len(b))).long())
    found = representation.fixed_points(case.m, few, max(64, case.n_loops), seed=case.seed)
    return representation.fixed_point_summary(found, few.clusters).assign(n_units=few.n_units)


def records(case: Case, rules: list | None = None) -> tuple[stopping.LoopRecord, stopping.LoopRecord]:
    """Every sequence run to the end, on test and on validation."""
    options = {"max_loops": case.n_loops, "rules": rules}
    test = stopping.record_loops(case.m, case.sequences, seed=case.seed, **options)
    held_out = replace(case.validation.sequences.rows(slice(case.n)), clusters=None)
    return test, stopping.record_loops(case.m, held_out, seed=case.seed + 1, **options)


def frontier(case: Case) -> pd.DataFrame:
    """All rules by replay, the fitted schedule, the oracle and fixed S."""
    return stopping.frontier.frontier(*records(case), N_THRESHOLDS)


def verdicts(case: Case) -> pd.DataFrame:
    """Non-inferiority and usefulness of every rule, a row each."""
    test, validation = records(case)
    bounds = [stopping.noninferiority(test, validation, rule, n_thresholds=N_THRESHOLDS) for rule in test.rules]
    useful = stopping.usefulness(test, validation, N_THRESHOLDS).rename(
        columns={
            "verdict": "useful",
            "threshold": "useful_threshold",
            "mean_loops": "useful_loops",
            "n": "useful_n",
        }
    )
    return pd.DataFrame(bounds).merge(useful, on="rule", validate="1:1")


def calibration(case: Case) -> pd.DataFrame:
    """Criterion against the gain still to come, all rules."""
    test, _ = records(case)
    return pd.concat([stopping.calibration(test, rule) for rule in test.rules], ignore_index=True)


def state_rule(case: Case) -> StateDelta:
    """State-delta at the middle threshold of its range on the test set's first loops."""
    test, _ = records(case, [StateDelta(max_loops=case.n_loops, positions="masked")])
    middle = thresholds(test, "state-delta", N_THRESHOLDS)
    return StateDelta(middle[len(middle) // 2], max_loops=case.n_loops, positions="masked")


def usage(case: Case) -> pd.DataFrame:
    """Loops under state-delta at its middle threshold, by mask ratio, difficulty, token class; both scopes."""
    return stopping.loop_usage(case.m, case.sequences, state_rule(case), seed=case.seed)


def start(case: Case) -> dict:
    """What sampling starts from: puzzles of 16 clues in 36 on Sudoku, else everything masked."""
    board = BOARDS.get(case.test.task)
    if board is None:
        return {"clues": case.masked(1.0), "steps": 32}
    clues = puzzles(board, case.tokens, round(16 / 36 * board.n_cells), False, case.seed)
    return {"clues": clues, "board": board, "steps": int(clues.masked[0].sum())}


def sampling(case: Case) -> pd.DataFrame:
    """Sampling end to end with state-delta in both scopes, beside fixed S."""
    rule = state_rule(case)
    token = StateDelta(rule.threshold, max_loops=case.n_loops, positions="masked", scope="token")
    return stopping.stopping_in_sampling(
        case.m, [rule, token], max_loops=case.n_loops, seed=case.seed, **start(case)
    )


def by_step(case: Case) -> pd.DataFrame:
    """Loops used along a sampling run under state-delta at its middle threshold."""
    given = {name: value for name, value in start(case).items() if name != "board"}
    return stopping.usage_by_step(case.m, state_rule(case), seed=case.seed, **given)


def predictor(case: Case) -> pd.DataFrame:
    """Frontier of stopping by a predicted remaining gain."""
    rules = stopping.feature_rules(case.n_loops)
    return stopping.predictor_frontier(*records(case, rules), N_THRESHOLDS)


def foresight(case: Case) -> pd.DataFrame:
    """How well the remaining gain is predicted."""
    return stopping.prediction_quality(*records(case, stopping.feature_rules(case.n_loops)))


def loops_or_steps(case: Case) -> pd.DataFrame:
    """Loops against denoising steps at the FLOPs of S_max loops in 2, 4, 8 and 16 steps."""
    given = start(case)
    given.pop("steps")
    length = case.tokens.shape[1]
    budgets = [steps * forward_flops(case.m.cfg, length, float(case.n_loops)) for steps in (2, 4, 8, 16)]
    counts = sorted({1, 2, max(1, case.n_loops // 2), case.n_loops})
    return stopping.loops_against_steps(
        case.m, None, budgets, counts, test=case.sequences, seed=case.seed, **given
    )


def mediated(case: Case) -> pd.DataFrame:
    """Share of the gain of looping lost by cuts, their controls, and stale values."""
    return interventions.mediated_share(case.m, case.sequences, case.n_loops, seed=case.seed)


def effects(make: Callable) -> Callable[[Case], pd.DataFrame]:
    """Effect of an intervention at each loop alone and from it on, by mask ratio."""

    def run(case: Case) -> pd.DataFrame:
        parts = [
            interventions.effect_by_loop(
                case.m, case.sequences, lambda loops: make(case.m, loops), case.n_loops, onward, seed=case.seed
            )
            for onward in (False, True)
        ]
        return pd.concat(parts, ignore_index=True)

    return run


def boards(function: Callable[..., pd.DataFrame], n_clues: int, unique: bool) -> Callable[[Case], pd.DataFrame]:
    """On puzzles with `n_clues` of 36 given, scaled to the board's size."""

    def run(case: Case) -> pd.DataFrame:
        board = BOARDS[case.test.task]
        clues = round(n_clues / 36 * board.n_cells)
        return function(case.m, puzzles(board, case.tokens, clues, unique, case.seed), case.n_loops)

    return run


def orders(case: Case) -> pd.DataFrame:
    """Rates and contrasts (`kind`) at S = 1 and n_loops, 26 of 36 cells hidden."""
    board = BOARDS[case.test.task]
    b = puzzles(board, case.tokens, round(10 / 36 * board.n_cells), False, case.seed)
    found = known.order_interaction(case.m, b, (1, case.n_loops))
    return pd.concat([found.rates.assign(kind="rate"), found.contrasts.assign(kind="contrast")], ignore_index=True)


def rounds(function: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """Against belief propagation, at three mask ratios."""

    def run(case: Case) -> pd.DataFrame:
        parts = [
            function(case.m, case.masked(ratio), case.test.task, case.n_loops).assign(nominal_mask_ratio=ratio)
            for ratio in RATIOS
        ]
        return pd.concat(parts, ignore_index=True)

    return run


def looped_without_training(
    case: Case, blocks: Sequence[tuple[int, int]] | None = None, n_samples: int = 2
) -> pd.DataFrame:
    """Looping the middle of a non-looped stack: `blocks` as `training_free` takes them, or every one."""
    return training_free(case.m, case.sequences, blocks=blocks, n_samples=n_samples, seed=case.seed)
