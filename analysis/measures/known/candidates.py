"""What is each cell still considering after every loop, against the candidates that k rounds of propagation leave?

If loop i is round i, the read-out's live symbols (`considered.py`) are the candidates C_i: what round r excludes
dies in loop r. Of hidden cells, averaged over cells (or symbols) of all boards with one solution:

    mass            sum over C_k of p_i
    kl              KL(uniform over C_k || p_i), nats: grows with mass off the set and with candidates given up
    precision       share of live symbols that are candidates; recall: of candidates that are live
    jaccard         |live and C_k| / |live or C_k|
    auc             p of a candidate above p of an excluded symbol of the same cell (ties half): no threshold
    excluded_live   share of symbols excluded by round k that are live
    nearest         the round whose C_k has the least kl on a board, mean over boards (nearest_jaccard: the most
                    jaccard); rounds that change nothing on the board any more are its last one, and of rounds that
                    tie exactly the first counts
    lead            nearest less the round that a round a loop would give, min(i, the board's last)
    live            share of the symbols excluded in round r that are live; `round` missing: wrong, never excluded
    death           share of them that die in loop i for good; `loop` missing: live after the last
    death_loop, death_median   mean and median loop of death by r; what never dies counts as dying after the last
    slope           of the loop of death on the round of exclusion, least squares over such symbols: 1 where a loop
                    is a round; never dying counts as above, which flattens it. It is above 0 in a model
                    without loops, too, whose hard cells are the open ones: compare with such a model
    true_dead       share of cells whose own symbol is dead: given up too early
    solved, newly_solved, newly_undone   shares of boards; undone: of those ever solved, not solved at last

Arms: observed; shuffled (candidates of another board with the same cells hidden: what the clues' places give
alone); untrained (`twins.py`). A model that answers at once what it can answer is near the last round from the
first loop on, whatever it does inside: a lead says so. Errors over boards. Definitions are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.known.boards import puzzles_of
from loopmdm.analysis.measures.known.considered import NEVER, RULES, Allowed, Considered, allowed, considered
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.twins import untrained
from loopmdm.analysis.numbers import stats
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch

ARMS = ("observed", "shuffled", "untrained")
COLUMNS = ["n_loops", "arm", "rule", "metric", "loop", "round", "value", "standard_error", "low", "high", "n"]


@dataclass(frozen=True)
class _Boards:
    """Who the rows belong to; means over boards in which each counts what it has."""

    owner: np.ndarray
    n: int
    clusters: np.ndarray | None

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums [board, ..] of values [row, ..]."""
        total = np.zeros((self.n, *values.shape[1:]))
        np.add.at(total, self.owner, values)
        return total

    def ratio(self, total: np.ndarray, number: np.ndarray) -> dict[str, float]:
        """Sum of `total` over sum of `number`, both [board], and its error."""
        if not number.any():
            return {"value": np.nan, "standard_error": np.nan, "n": 0}
        values = np.divide(total, number, out=np.full(self.n, np.nan), where=number > 0)
        return _said(*stats.weighted_mean_and_error(values, number.astype(float), self.clusters))

    def mean(self, values: np.ndarray) -> dict[str, float]:
        """Mean over boards."""
        return _said(*stats.mean_and_error(values, self.clusters))


def _said(value: Any, error: Any, n: Any) -> dict[str, float]:
    return {"value": float(value), "standard_error": float(error), "n": int(n)}


def candidates(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    threshold: float | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Read-outs against candidates, all metrics of the module, in all arms and by both rules of propagation.

    Columns: n_loops arm rule metric loop round value standard_error low high n. `round` is k for metrics of sets,
    r for those of exclusion; both are missing where a metric has none. `low`..`high`: 95%, Student's t over boards
    or clusters of them. Boards with several solutions are left out; UsageError where none is left.

    >>> df = lm.candidates(m, b, n_loops=4)
    >>> "slope" in set(df["metric"])
    True
    """
    found = considered(m, b, n_loops, threshold)
    ignorant = considered(untrained(m, seed), found.batch, len(found.log_p), threshold)
    rows = []
    for arm in ARMS:
        read = ignorant if arm == "untrained" else found
        label = {"n_loops": len(found.log_p), "arm": arm}
        rows += [label | row for row in (_of_boards(read) if arm != "shuffled" else ())]
        if arm == "shuffled" and len(found.batch) < 2:
            continue
        for rule in RULES:
            sets = allowed(read, rule, shuffled=arm == "shuffled")
            rows += [label | {"rule": rule} | row for row in _of_sets(read, sets)]
            rows += [label | {"rule": rule} | row for row in _of_deaths(read, sets)]
    frame = pd.DataFrame(rows, columns=[name for name in COLUMNS if name not in ("low", "high")])
    units = frame["n"].map({n: stats.count_units(int(n), found.batch.clusters) for n in frame["n"].unique()})
    half = frame["standard_error"] * units.map({n: stats.t95(int(n)) for n in units.unique()})
    frame = frame.assign(low=frame["value"] - half, high=frame["value"] + half)[COLUMNS]
    return frame.astype({"loop": "Int64", "round": "Int64"})


# --- sets ---


def _of_sets(read: Considered, sets: Allowed) -> Iterator[dict]:
    boards = _Boards(read.owner, len(read.batch), read.batch.clusters)
    loops, rounds = len(read.log_p), len(sets.sets)
    cells = boards.sums(np.ones(len(read.owner)))
    near = {name: np.zeros((loops, rounds, boards.n)) for name in ("kl", "jaccard")}
    for loop in range(loops):
        for step in range(rounds):
            place = {"loop": loop, "round": step}
            for metric, (total, number) in _compared(read, sets, loop, step).items():
                sums = boards.sums(total), boards.sums(number)
                yield place | {"metric": metric} | boards.ratio(*sums)
                if metric in near:
                    near[metric][loop, step] = sums[0] / cells
    for loop in range(loops):
        nearest = _first_least(near["kl"][loop], sets.last)
        alike = _first_least(-near["jaccard"][loop], sets.last)
        paced = nearest - np.minimum(loop, sets.last)
        for metric, values in (("nearest", nearest), ("nearest_jaccard", alike), ("lead", paced)):
            yield {"metric": metric, "loop": loop} | boards.mean(values.astype(float))


def _first_least(values: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The first round with the least value [board], of [round, board] up to each board's `last`."""
    beyond = np.arange(len(values))[:, None] > last
    values = np.where(beyond, np.inf, values)
    return (values <= values.min(0) + 1e-9).argmax(0)


def _compared(read: Considered, sets: Allowed, loop: int, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per row a sum and the number of things it runs over."""
    p, log_p, live, may = read.p[loop], read.log_p[loop].numpy(), read.live[loop], sets.sets[step]
    size, one = may.sum(-1), np.ones(len(may))
    both, either = (live & may).sum(-1), (live | may).sum(-1)
    pairs = may[:, :, None] & ~may[:, None, :]
    won = (p[:, :, None] > p[:, None, :]) + 0.5 * (p[:, :, None] == p[:, None, :])
    n_pairs = pairs.sum((1, 2))
    auc = np.divide((won * pairs).sum((1, 2)), n_pairs, out=np.zeros(len(may)), where=n_pairs > 0)
    return {
        "mass": ((p * may).sum(-1), one),
        "kl": (-np.log(size) - (log_p * may).sum(-1) / size, one),
        "precision": (both, live.sum(-1)),
        "recall": (both, size),
        "jaccard": (both / either, one),
        "auc": (auc, (n_pairs > 0).astype(float)),
        "excluded_live": ((live & ~may).sum(-1), (~may).sum(-1)),
    }


# --- deaths ---


def _of_deaths(read: Considered, sets: Allowed) -> Iterator[dict]:
    boards = _Boards(read.owner, len(read.batch), read.batch.clusters)
    n_loops, excluded, wrong = len(read.log_p), sets.excluded, ~read.truth
    late = np.where(read.died == NEVER, n_loops, read.died)
    for step in np.unique(excluded[wrong]):
        group = wrong & (excluded == step)
        number = boards.sums(group.sum(-1))
        at = {"round": None if step == NEVER else int(step)}
        for loop in range(n_loops):
            live = boards.sums((group & read.live[loop]).sum(-1))
            yield at | {"metric": "live", "loop": loop} | boards.ratio(live, number)
        for loop in (*range(n_loops), NEVER):
            dying = boards.sums((group & (read.died == loop)).sum(-1))
            when = {"loop": None if loop == NEVER else loop}
            yield at | {"metric": "death"} | when | boards.ratio(dying, number)
        yield at | {"metric": "death_loop"} | boards.ratio(boards.sums((late * group).sum(-1)), number)
        median = {"value": float(np.median(late[group])), "n": int((number > 0).sum())}
        yield at | {"metric": "death_median"} | median
    counted = wrong & (excluded != NEVER)
    owner = np.broadcast_to(read.owner[:, None], counted.shape)[counted]
    boards = _Boards(owner, len(read.batch), read.batch.clusters)
    yield {"metric": "slope"} | _slope(excluded[counted].astype(float), late[counted].astype(float), boards)


def _slope(x: np.ndarray, y: np.ndarray, boards: _Boards) -> dict[str, float]:
    """Least squares of y on x, its error by each board's influence; NaN where x is constant."""
    n = len(np.unique(boards.owner))
    apart = x - x.mean() if len(x) else x
    spread = (apart**2).sum()
    if not spread > 0:
        return {"value": np.nan, "standard_error": np.nan, "n": n}
    slope = (apart * y).sum() / spread
    left = y - y.mean() - slope * apart
    present = boards.sums(np.ones(len(x))) > 0
    influence = np.where(present, n * boards.sums(apart * left) / spread, np.nan)
    return _said(slope, stats.influence_error(influence, boards.clusters), n)


# --- boards ---


def _of_boards(read: Considered) -> Iterator[dict]:
    boards, solved = _Boards(read.owner, len(read.batch), read.batch.clusters), read.solved
    for loop, now in enumerate(solved):
        dead = boards.sums((read.truth & ~read.live[loop]).any(-1).astype(float))
        yield {"metric": "true_dead", "loop": loop} | boards.ratio(dead, boards.sums(np.ones(len(read.owner))))
        yield {"metric": "solved", "loop": loop} | boards.mean(now.astype(float))
        before = solved[loop - 1] if loop else np.zeros_like(now)
        yield {"metric": "newly_solved", "loop": loop} | boards.mean((now & ~before).astype(float))
        yield {"metric": "newly_undone", "loop": loop} | boards.mean((before & ~now).astype(float))
    ever = solved.any(0)
    yield {"metric": "ever_solved"} | boards.mean(ever.astype(float))
    yield {"metric": "undone"} | boards.ratio((ever & ~solved[-1]).astype(float), ever.astype(float))


def on_boards(case: Case, n_clues: int = 20, unique: bool = True) -> pd.DataFrame:
    """On its test grids, `n_clues` of 36 cells given, scaled to the board's size."""
    return candidates(case.m, puzzles_of(case, n_clues, unique), case.n_loops, seed=case.seed)


MEASURES = (
    Measure("candidates", "symbols that each cell still considers, by rounds of propagation", on_boards, "Sudoku"),
)
