"""When does a Sudoku cell settle, against how deep constraint propagation has to go for it?

    loop_settled = first loop after which a hidden cell is right and stays right to the last; missing if never
    depth        = round in which propagation derives the cell (from 1), -1 if it needs search

If loops are rounds of propagation, loop_settled grows with depth. The rank correlation (Spearman's, within a
puzzle, mean over puzzles) takes cells that never settle as the last and cells that need search as the deepest.
Three arms:

    observed          as it is
    shuffled          depths permuted over the puzzle's hidden cells: what no relation gives
    given candidates  partial correlation, given the number of symbols that the clues leave to the cell: easy cells
                      are both shallow and quick, and need no loops for it

A model without loops has a correlation, too: its shallow cells are right, its deep ones never. What looping adds
is the shares of a depth over loops, and what is left above such a model. Only puzzles with one solution count.
Definitions are ours.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from loopmdm.analysis.measures.known.boards import board_of, boards_after_loops, on_puzzles
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import MaskedBatch, as_batch
from loopmdm.model.tasks.propagation import Propagation, propagate, unique

NEVER = -1
ARMS = ("observed", "shuffled", "given candidates")


def settled_at(right: np.ndarray) -> Int[np.ndarray, "batch cell"]:
    """First loop from which on `right` [loop, batch, cell] holds to the end; NEVER = -1 if the last is wrong."""
    lasting = np.logical_and.accumulate(right[::-1])[::-1]
    return np.where(lasting[-1], lasting.argmax(0), NEVER)


def settling_by_depth(
    m: LoopedModel,
    b: MaskedBatch,
    n_loops: int | None = None,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Where cells of each depth settle.

    Columns: n_loops depth loop_settled share standard_error n_cells n. `loop_settled` is missing in the row of the
    cells that never settle; shares of a depth sum to 1 over it. `depth` -1: needs search. Errors over puzzles, or
    over `clusters` of them; n puzzles have n_cells such cells. A depth that no cell has, has no row.
    """
    loops, reached, part, n_loops = _settled(m, as_batch("settling_by_depth", b, clusters), n_loops, batch_size)
    depth, hidden, clusters = reached.depth.numpy(), part.masked.cpu().numpy(), part.clusters
    rows = []
    for level in np.unique(depth[hidden]):
        here = hidden & (depth == level)
        number = here.sum(-1)
        for loop in (*range(n_loops), NEVER):
            count = (here & (loops == loop)).sum(-1)
            values = np.divide(count, number, out=np.full(len(number), np.nan), where=number > 0)
            share, error, n = stats.weighted_mean_and_error(values, number.astype(float), clusters)
            rows.append((n_loops, int(level), None if loop == NEVER else loop, float(share), float(error),
                         int(number.sum()), int(n)))  # fmt: skip
    columns = ["n_loops", "depth", "loop_settled", "share", "standard_error", "n_cells", "n"]
    return pd.DataFrame(rows, columns=columns).astype({"loop_settled": "Int64"})


def settling_correlation(
    m: LoopedModel,
    b: MaskedBatch,
    n_loops: int | None = None,
    n_shuffles: int = 200,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Rank correlation of loop_settled with depth within a puzzle, against shuffled depths and given candidates.

    Columns: n_loops arm correlation standard_error low high n. `low`..`high` is the 95% interval of the mean over
    puzzles (Student's t); of "shuffled", the range of 95% of `n_shuffles` means without any relation. Puzzles
    where all cells settle at once, or all have one depth, have no correlation and do not count.
    """
    check_count("n_shuffles", n_shuffles)
    loops, reached, part, n_loops = _settled(m, as_batch("settling_correlation", b, clusters), n_loops, batch_size)
    hidden, clusters = part.masked.cpu().numpy(), part.clusters
    late = np.where(loops == NEVER, n_loops, loops)
    depth, candidates = reached.depth.numpy(), reached.candidates.numpy()
    deep = np.where(depth < 0, depth.max(initial=0) + 1, depth)
    lots = row_uniforms(seed, "order", len(late), late.shape[1] * n_shuffles).numpy() if len(late) else late
    values = np.full((len(late), 2 + n_shuffles), np.nan)
    for row, cells in enumerate(hidden):
        x, y, z = (ranks(each[row, cells]) for each in (late, deep, candidates))
        values[row, 0], values[row, 1] = correlation(x, y), partial(x, y, z)
        places = lots[row].reshape(n_shuffles, -1)[:, : cells.sum()].argsort(-1)
        values[row, 2:] = correlation(x, y[places])
    rows = [_interval(n_loops, arm, values[:, index], clusters) for index, arm in ((0, ARMS[0]), (1, ARMS[2]))]
    rows.insert(1, _null(n_loops, values[:, 2:]))
    return pd.DataFrame(rows, columns=["n_loops", "arm", "correlation", "standard_error", "low", "high", "n"])


def _settled(
    m: LoopedModel, b: MaskedBatch, n_loops: int | None, batch_size: int
) -> tuple[np.ndarray, Propagation, MaskedBatch, int]:
    """loop_settled and propagation of the puzzles that have one solution; these puzzles; loops run."""
    board = board_of(b)
    kept = unique(board, b.tokens) & b.masked.any(-1).cpu()
    if not bool(kept.any()):
        raise UsageError("no puzzle has exactly one solution; make them with puzzles(..., unique=True)")
    part = b.rows(kept.to(b.tokens.device))
    filled = boards_after_loops(m, part, n_loops, batch_size)
    loops = settled_at((filled == part.clean.cpu()).numpy())
    return loops, propagate(board, part.tokens), part, len(filled)


def _interval(n_loops: int, arm: str, values: np.ndarray, clusters: np.ndarray | None) -> tuple:
    mean, error, n = stats.mean_and_error(values, clusters)
    known = np.isfinite(values)
    half = error * stats.t95(int(n) if clusters is None else len(np.unique(clusters[known])))
    return n_loops, arm, float(mean), float(error), float(mean - half), float(mean + half), int(n)


def _null(n_loops: int, values: np.ndarray) -> tuple:
    """Mean and spread of the means of shuffled puzzles."""
    means, _, n = stats.mean_and_error(values)
    if not n.max(initial=0):
        return n_loops, ARMS[1], np.nan, np.nan, np.nan, np.nan, 0
    low, high = np.quantile(means, [0.025, 0.975])
    spread = float(means.std(ddof=1)) if len(means) > 1 else np.nan
    return n_loops, ARMS[1], float(means.mean()), spread, float(low), float(high), int(n[0])


def ranks(values: np.ndarray) -> Float[np.ndarray, " cell"]:
    """Ranks, ties at their mean."""
    from scipy.stats import rankdata  # late: half a second

    return np.asarray(rankdata(values))


def correlation(x: Float[np.ndarray, " cell"], y: Float[np.ndarray, "*shuffle cell"]) -> np.ndarray:
    """Pearson's of rank vectors; NaN if either is constant."""
    x, y = x - x.mean(), y - y.mean(-1, keepdims=True)
    norm = np.sqrt((x @ x) * (y**2).sum(-1))
    return np.divide(y @ x, norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def partial(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> float:
    """Partial correlation of x and y given z; NaN where z leaves nothing of either to explain."""
    if np.ptp(z) == 0:
        return float(correlation(x, y))
    xy, xz, yz = (float(correlation(*pair)) for pair in ((x, y), (x, z), (y, z)))
    left = (1 - xz**2) * (1 - yz**2)
    return float((xy - xz * yz) / np.sqrt(left)) if left > 1e-12 else float("nan")


MEASURES = (
    Measure(
        "sudoku-settling",
        "loop at which a cell is right, by propagation depth",
        on_puzzles(settling_by_depth),
        "Sudoku",
    ),
    Measure(
        "sudoku-depth",
        "rank correlation of that loop with the depth, and its null",
        on_puzzles(settling_correlation),
        "Sudoku",
    ),
)
