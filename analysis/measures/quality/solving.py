"""Sudoku: share of puzzles completed validly, by loops, clue count and generation order."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS

CLUE_SHARES = (24 / 36, 20 / 36, 16 / 36, 10 / 36)
ORDERS = ("confidence", "one-shot", "row-major", "hardest-first")
COLUMNS = ["n_loops", "n_clues", "hidden", "unique", "order", "steps", "temperature", "flops",
           "solve_rate", "low", "high", "gain", "gain_se", "interaction", "interaction_se", "n"]  # fmt: skip


def solve_rate(
    case: Case,
    counts: list[int],
    n_clues: Sequence[int] = (),
    orders: Sequence[str] = ORDERS,
    unique: bool = False,
    n: int = 200,
) -> pd.DataFrame:
    """Share of `n` test grids completed validly, with Wilson's 95% interval; any valid completion counts.

    One cell a step (one-shot: all at once), always the best symbol. `n_clues` defaults to 24, 20, 16 and 10 of
    36; hidden cells are random, or with `unique` such that one solution is left. `gain` is over the smallest
    loop count asked for and `interaction` is the gain less that of the first order, each paired by puzzle.
    `flops` are those of one puzzle.
    """
    if case.test.task not in BOARDS:
        raise UsageError(f"{case.m.model_name} was not trained on Sudoku; solve-rate needs such a model")
    board = BOARDS[case.test.task]
    rows = []
    for clues in n_clues or [round(share * board.n_cells) for share in CLUE_SHARES]:
        b = puzzles(board, case.test.tokens[:n], clues, unique)
        hidden, first = board.n_cells - clues, {}
        for order in orders:
            least: np.ndarray | None = None
            for count in counts:
                r = sample(
                    case.m,
                    clues=b,
                    steps=hidden,
                    n_loops=count,
                    order=order,
                    temperature=0.0,
                    batch_size=200,
                )
                solved = board.is_valid(r.tokens).cpu().numpy().astype(float)
                least = solved if least is None else least
                against = first.setdefault(count, solved - least)
                gain, gain_se, _ = stats.mean_and_error(solved - least)
                interaction, interaction_se, _ = stats.mean_and_error(solved - least - against)
                rows.append((
                    count, clues, hidden, unique, order, len(r.loops_used), 0.0, r.flops / len(solved),
                    solved.mean(), *stats.wilson(int(solved.sum()), len(solved)),
                    float(gain), float(gain_se), float(interaction), float(interaction_se), len(solved),
                ))  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


MEASURES = (
    Measure(
        "solve-rate",
        "share of Sudoku puzzles completed validly, by clues and order",
        solve_rate,
        "loops",
        others=False,
    ),
)
