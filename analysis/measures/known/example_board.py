"""One Sudoku board over loops as a table, chosen by rule and not by hand: what each cell still considers.

    solved late    solved after the last loop and not after the first
    undone         solved after some loop and not after the last
    wrong          not solved after the last loop

Of the boards that are so, the one with the longest chain of deductions (`propagate`; needing search counts as the
longest), of several the first.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from loopmdm.analysis.measures.known.considered import RULES, Allowed, Considered, allowed, considered, only
from loopmdm.model.errors import UsageError, check_count, check_word
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import propagate

KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "solved late": lambda solved: solved[-1] & ~solved[0],
    "undone": lambda solved: solved.any(0) & ~solved[-1],
    "wrong": lambda solved: ~solved[-1],
}
"""Whether a board is so, from `solved` [loop, batch]."""


def example_board(
    m: LoopedModel,
    b: MaskedBatch,
    n_loops: int | None = None,
    kind: str = "solved late",
    rule: str = "naked singles",
    n_rounds: int | None = None,
) -> pd.DataFrame:
    """One of the boards of `b` after each loop, and what propagation by `rule` has after `n_rounds` (default: S).

    A row per panel, cell and symbol. Columns: panel loop rounds cell row column box symbol p live best clue
    settled right changed; symbols from 1. `settled`: one symbol is live; `right`: the best one is the solution's;
    `changed`: the best one is not that of the panel before. `loop` is missing in the last panel, where p is
    uniform over the candidates, `rounds` in the others. attrs: "board" its number among those with one solution,
    "depth" its chain, -1 where it needs search, "threshold" of live. UsageError where no board is of that kind.
    """
    check_word("kind", kind, list(KINDS))
    check_word("rule", rule, list(RULES))
    found = considered(m, b, n_loops)
    depth = propagate(found.board, found.batch.tokens).depth.numpy()
    chain = np.where((depth < 0).any(-1), found.board.n_cells, depth.max(-1))
    fitting = np.flatnonzero(KINDS[kind](found.solved))
    if not len(fitting):
        raise UsageError(f"none of {len(chain)} boards is {kind}; give more puzzles, or another kind")
    number = int(fitting[chain[fitting].argmax()])
    read = only(found, number)
    rounds = check_count("n_rounds", len(read.log_p) if n_rounds is None else n_rounds, least=0)
    sets = allowed(read, rule)
    p = np.stack([*read.p, _uniform(sets, rounds)])
    live = np.stack([*read.live, p[-1] > 0])
    frame = _table(read, p, live, rounds)
    alone = int(chain[number]) if chain[number] < found.board.n_cells else -1
    frame.attrs |= {"board": number, "depth": alone, "threshold": found.threshold}
    return frame


def _uniform(sets: Allowed, rounds: int) -> np.ndarray:
    """Over the candidates after so many rounds; beyond the last that changes anything they stay."""
    may = sets.sets[min(rounds, len(sets.sets) - 1)]
    return may / may.sum(-1, keepdims=True)


def _table(read: Considered, p: np.ndarray, live: np.ndarray, rounds: int) -> pd.DataFrame:
    """All panels, clues with p = 1 for their symbol."""
    board, n_panels = read.board, len(p)
    cell = np.arange(board.n_cells)
    hidden, clean = read.hidden[0].numpy(), read.batch.clean[0].cpu().numpy()
    shape = n_panels, board.n_cells, board.size
    full = np.broadcast_to(np.eye(board.size)[clean], shape).copy()
    alive = full > 0
    full[:, hidden], alive[:, hidden] = p, live
    best = full.argmax(-1)
    changed = np.zeros(best.shape, dtype=bool)
    changed[1:] = best[1:] != best[:-1]
    changed[-1] = False  # propagation is no later loop
    row, column = cell // board.size, cell % board.size
    box = row // board.box_rows * board.box_rows + column // board.box_columns
    by_cell = {"cell": cell, "row": row, "column": column, "box": box, "clue": ~hidden}
    by_panel = {"best": best + 1, "settled": alive.sum(-1) == 1, "right": best == clean, "changed": changed}
    index = np.indices(shape).reshape(3, -1)
    word = "round" if rounds == 1 else "rounds"
    names = [f"loop {loop + 1}" for loop in range(n_panels - 1)] + [f"propagation, {rounds} {word}"]
    frame = {
        "panel": np.array(names)[index[0]],
        "loop": pd.array([*range(n_panels - 1), None], dtype="Int64").take(index[0]),
        "rounds": pd.array([None] * (n_panels - 1) + [rounds], dtype="Int64").take(index[0]),
        "symbol": index[2] + 1,
        "p": full.ravel(),
        "live": alive.ravel(),
    }
    frame |= {name: values[index[1]] for name, values in by_cell.items()}
    frame |= {name: values[index[0], index[1]] for name, values in by_panel.items()}
    order = ["panel", "loop", "rounds", "cell", "row", "column", "box", "symbol", "p", "live", "best", "clue"]
    return pd.DataFrame(frame)[[*order, "settled", "right", "changed"]]
