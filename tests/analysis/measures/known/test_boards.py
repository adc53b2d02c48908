"""Sudoku boards by loop: planted solvers are recovered, and so is what they are not."""

import itertools

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures.known import (
    boards_after_loops,
    boards_by_loop,
    settling_by_depth,
    settling_correlation,
)
from loopmdm.analysis.measures.known.boards import board_of, violations
from loopmdm.analysis.measures.known.settling import NEVER, partial, settled_at
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.masking import hide
from loopmdm.model.tasks.propagation import propagate, unique
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import solve_one_shot
from tests.conftest import toy_config

SIX = BOARDS["sudoku6"]


class Scheduled:
    """Answers puzzles rightly at each cell from its own loop `when` [batch, cell] on, wrongly before."""

    def __init__(self, b, when, size=6):
        self.b, self.when, self.size = b, torch.as_tensor(when), size
        self.cfg = toy_config(d_vocab=size + 1, n_ctx=size**2)

    def states(self, tokens, n_loops, attention_mask=None):
        rows = torch.tensor([int((self.b.tokens == row).all(-1).nonzero()[0, 0]) for row in tokens])
        for loop in range(n_loops):
            yield torch.tensor(loop), rows

    def readout(self, state, context, *, rows):
        clean, late = self.b.clean[context], self.when[context] > state
        answer = torch.where(late, (clean + 1) % self.size, clean)[rows]
        return torch.nn.functional.one_hot(answer, self.size + 1).float()


def naive_board(filled, hidden, size, rows, columns):
    """Counts of one board, pair by pair and unit by unit."""
    cells = range(size * size)
    place = lambda c: (c // size, c % size, c // size // rows * rows + c % size // columns)  # noqa: E731
    peers = [(c, d) for c in cells for d in cells if c != d and any(map(int.__eq__, place(c), place(d)))]
    same = [(c, d) for c, d in peers if hidden[c] and filled[c] == filled[d]]
    members = [[c for c in cells if place(c)[kind] == n] for kind in range(3) for n in range(size)]
    there = [unit for unit in members if any(hidden[c] for c in unit)]
    twice = [unit for unit in there if len({filled[c] for c in unit}) < size]
    valid = all(len({filled[c] for c in unit}) == size for unit in members)
    clue = sum(not hidden[d] for _, d in same)
    return {
        "clue_conflicts": (clue, sum(hidden[c] and not hidden[d] for c, d in peers)),
        "guess_conflicts": (len(same) - clue, sum(hidden[c] and hidden[d] for c, d in peers)),
        "conflicting": (len({c for c, _ in same}), sum(hidden)),
        "violated_units": (len(twice), len(there)),
        "valid": (valid, 1),
        "plausible_invalid": (clue == 0 and not valid, 1),
    }


@pytest.mark.parametrize("name", ["sudoku4", "sudoku6"])
def test_violations_are_those_counted_pair_by_pair(name):
    board = BOARDS[name]
    grids = board.sample_grids("test", 6)
    hidden = torch.rand(grids.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden[0], noise = False, torch.rand(grids.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    noise[5] = False
    filled = torch.where(hidden & noise, (grids + 1) % board.size, grids)
    found = violations(board, filled, hidden)
    for row in range(6):
        counts = naive_board(
            filled[row].tolist(), hidden[row].tolist(), board.size, board.box_rows, board.box_columns
        )
        for metric, (total, number) in counts.items():
            assert (int(found[metric][0][row]), int(found[metric][1][row])) == (total, number), (metric, row)
    kinds = [found[f"violated_{kind}"] for kind in ("rows", "columns", "boxes")]
    for index in range(2):
        assert torch.equal(sum(kind[index] for kind in kinds), found["violated_units"][index])
    assert found["valid"][0].tolist() == board.is_valid(filled).tolist() and found["valid"][0][5]


def test_one_board_by_hand():
    # 0 1|2 3 with cells 0 and 1 of the first row hidden and swapped: the row and the box stay whole, both columns
    # 2 3|0 1 break, each cell against one clue; a copy of cell 1 in cell 0 instead breaks row and box, too.
    board = BOARDS["sudoku4"]
    grid = torch.tensor([[0, 1, 2, 3, 2, 3, 0, 1, 1, 0, 3, 2, 3, 2, 1, 0]])
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, :2] = True
    swapped, copied = grid.clone(), grid.clone()
    swapped[0, :2], copied[0, 0] = torch.tensor([1, 0]), 1
    ratio = lambda filled: {k: (int(a[0]), int(n[0])) for k, (a, n) in violations(board, filled, hidden).items()}  # noqa: E731
    one, two = ratio(swapped), ratio(copied)
    # Peers of a corner cell: 3 in the row, 3 in the column, 1 more in the box; one of them hidden.
    assert one["clue_conflicts"] == (2, 12) and one["guess_conflicts"] == (0, 2)
    assert one["violated_rows"] == (0, 1) and one["violated_columns"] == (2, 2) and one["violated_boxes"] == (0, 1)
    assert two["clue_conflicts"] == (1, 12) and two["guess_conflicts"] == (2, 2) and two["conflicting"] == (2, 2)
    assert two["violated_rows"] == (1, 1) and two["violated_columns"] == (1, 2) and two["violated_boxes"] == (1, 1)
    assert one["plausible_invalid"] == (0, 1) and one["valid"] == (0, 1) and ratio(grid)["valid"] == (1, 1)


def table(frame):
    return frame.pivot(index="loop", columns="metric", values="value")


def test_planted_repairs_are_counted(unique_puzzles):
    b = unique_puzzles
    when = torch.randint(0, 5, b.tokens.shape, generator=torch.Generator().manual_seed(0))
    frame = boards_by_loop(Scheduled(b, when), b, 6, batch_size=7)
    value = table(frame)
    late = when[b.masked]
    for loop in range(6):
        assert value["wrong"][loop] == pytest.approx(float((late > loop).double().mean()))
        assert loop == 0 or value["repaired"][loop] == pytest.approx(float((late == loop).double().mean()))
    assert (value["broken"][1:] == 0).all() and value["valid"][5] == 1 and value["violated_units"][5] == 0
    assert value["wrong_cells"][0] == pytest.approx(float(((when > 0) & b.masked).sum(-1).double().mean()))
    first = frame[frame["loop"] == 0].set_index("metric")
    for metric in ("repaired", "broken", "changed_conflicting", "changed_other"):
        assert np.isnan(first["value"][metric]) and first["n"][metric] == 0
    assert np.isnan(value["changed_conflicting"][5]) or value["changed_conflicting"][5] >= 0


def test_a_models_boards_add_up(sudoku_toy, unique_puzzles):
    m, b = HookedLoopMDM(sudoku_toy), unique_puzzles
    filled = boards_after_loops(m, b, 4, batch_size=9)
    torch.testing.assert_close(filled, boards_after_loops(sudoku_toy, b, 4, batch_size=64))
    for loop in range(4):
        best = sudoku_toy(b.tokens, n_loops=loop + 1).argmax(-1)
        assert torch.equal(filled[loop], torch.where(b.masked, best, b.tokens))
    value = table(boards_by_loop(m, b, 4))
    assert value["wrong"].nunique() > 1
    for loop in range(1, 4):
        before, now = value.loc[loop - 1], value.loc[loop]
        assert now["wrong"] == pytest.approx(before["wrong"] - now["repaired"] + now["broken"])
        hidden, was = b.masked, filled[loop - 1]
        clash = torch.stack(
            [torch.tensor([bool(v) for v in _in_conflict(row)]) for row in was]
        ) & hidden  # fmt: skip
        changed = filled[loop] != was
        assert now["changed_conflicting"] == pytest.approx(float(changed[clash].double().mean()))
        assert now["changed_other"] == pytest.approx(float(changed[hidden & ~clash].double().mean()))


def _in_conflict(row):
    cells = row.view(6, 6).tolist()
    for r, c in itertools.product(range(6), range(6)):
        others = [(r, k) for k in range(6)] + [(k, c) for k in range(6)]
        others += [(r // 2 * 2 + i, c // 3 * 3 + j) for i in range(2) for j in range(3)]
        yield any(cells[i][j] == cells[r][c] for i, j in set(others) - {(r, c)})


def test_valid_boards_are_the_one_shot_solve_rate():
    m = HookedLoopMDM.from_pretrained("sudoku-loop")
    b = puzzles(SIX, SIX.sample_grids("test", 30), 16)
    frame = boards_by_loop(m, b, 6)
    solved = solve_one_shot(m.model, SIX, b, 6)
    value = table(frame)
    for loop in range(6):
        assert value["valid"][loop] == pytest.approx(float(solved[loop].double().mean()))
    one = unique(SIX, b.tokens)
    n = frame.set_index(["metric", "loop"])["n"]
    assert (
        n["wrong", 0] == int(one.sum()) < n["valid", 0] == 30
    )  # a solution to agree with only where there is one
    assert n["repaired", 3] == int(one.sum()) and (frame["mask_ratio"] == 20 / 36).all()
    alone = boards_by_loop(m, b.rows(~one), 2).set_index("metric")
    assert alone["value"]["wrong"].isna().all() and (alone["n"]["wrong"] == 0).all()


def test_errors_are_over_boards_or_clusters(unique_puzzles):
    b = unique_puzzles
    when = torch.randint(0, 3, b.tokens.shape, generator=torch.Generator().manual_seed(2))
    m = Scheduled(b, when)
    frame = boards_by_loop(m, b, 2, clusters=np.arange(40) // 4).set_index(["metric", "loop"])
    filled = boards_after_loops(m, b, 2)
    values = SIX.is_valid(filled[1]).double().numpy()
    assert frame["standard_error"]["valid", 1] == pytest.approx(
        float(stats.mean_and_error(values, np.arange(40) // 4)[1])
    )
    wrong = ((filled[0] != b.clean) & b.masked).sum(-1) / b.masked.sum(-1)
    expected = stats.weighted_mean_and_error(wrong.double().numpy(), b.masked.sum(-1).double().numpy())
    plain = boards_by_loop(m, b, 2).set_index(["metric", "loop"])
    assert plain["standard_error"]["wrong", 0] == pytest.approx(float(expected[1]))


def test_what_is_no_board_is_refused(sudoku_toy, batch, hooked):
    with pytest.raises(UsageError, match="16, 36, 81 cells"):
        boards_by_loop(hooked, batch)
    with pytest.raises(UsageError, match="valid sudoku6"):
        board_of(hide(torch.zeros(1, 36).long(), torch.ones(1, 36).bool(), 6))
    four = BOARDS["sudoku4"].sample_grids("test", 2)
    with pytest.raises(UsageError, match="this one's is 6"):
        boards_by_loop(sudoku_toy, puzzles(BOARDS["sudoku4"], four, 8))
    with pytest.raises(UsageError, match="MaskedBatch"):
        boards_by_loop(sudoku_toy, four)


# --- settling ---


def test_settling_by_hand():
    right = np.array([[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]], dtype=bool)[:, None]
    assert settled_at(right).tolist() == [[1, 2, 0, NEVER]]


def test_loops_that_are_rounds_of_propagation_are_recovered(unique_puzzles):
    depth = propagate(SIX, unique_puzzles.tokens).depth
    solvable = (depth >= 0).all(-1)
    b, depth = unique_puzzles.rows(solvable), depth[solvable]
    m = Scheduled(b, depth - 1)
    frame = settling_by_depth(m, b, 8)
    known = frame[frame["share"] > 0]
    assert (known["loop_settled"] + 1 == known["depth"]).all() and (known["share"] == 1).all()
    assert known.set_index("depth")["n_cells"].to_dict() == {
        level: int((depth == level).sum()) for level in range(1, int(depth.max()) + 1)
    }
    arms = settling_correlation(m, b, 8, n_shuffles=50).set_index("arm")
    assert arms["correlation"]["observed"] == pytest.approx(1) and arms["low"]["observed"] == pytest.approx(1)
    null = arms.loc["shuffled"]
    assert -0.15 < null["low"] < 0 < null["high"] < 0.15 and abs(null["correlation"]) < 0.03
    assert arms["correlation"]["given candidates"] == pytest.approx(1)


def test_cells_that_never_settle_are_the_latest_and_those_that_need_search_the_deepest(unique_puzzles):
    depth = propagate(SIX, unique_puzzles.tokens).depth
    some = (depth.amax(-1) >= 3) & (depth >= 0).all(-1)
    b, when = unique_puzzles.rows(some), depth[some] - 1
    assert settling_correlation(Scheduled(b, when), b, 2, n_shuffles=2)["low"][0] > 0.9
    hard = puzzles(SIX, SIX.sample_grids("test", 150), 11, unique=True)
    depth = propagate(SIX, hard.tokens).depth
    some = (depth < 0).any(-1) & (depth > 0).any(-1)
    b, depth = hard.rows(some), depth[some]
    assert len(b) >= 2
    frame = settling_correlation(Scheduled(b, torch.where(depth < 0, 40, depth - 1)), b, 36, n_shuffles=2)
    assert frame["correlation"][0] == pytest.approx(1)
    search = settling_by_depth(Scheduled(b, torch.where(depth < 0, 40, 0)), b, 2).query("depth == -1")
    assert search.loc[search["loop_settled"].isna(), "share"].tolist() == [1]


def test_random_settling_has_no_relation(unique_puzzles):
    b = unique_puzzles
    m = Scheduled(b, torch.randint(0, 6, b.tokens.shape, generator=torch.Generator().manual_seed(5)))
    arms = settling_correlation(m, b, 6, n_shuffles=50).set_index("arm")
    for arm in ("observed", "given candidates"):
        assert arms["low"][arm] < 0 < arms["high"][arm] and arms["n"][arm] == 40
    frame = settling_by_depth(m, b, 3)
    np.testing.assert_allclose(frame.groupby("depth")["share"].sum(), 1)
    never = frame[frame["loop_settled"].isna()]  # half of the cells are right after loop 3 or later
    assert never["share"].iloc[0] == pytest.approx(0.5, abs=0.07)


def test_easy_cells_first_is_no_propagation_beyond_candidates(unique_puzzles):
    b = unique_puzzles
    noise = torch.rand(b.tokens.shape, generator=torch.Generator().manual_seed(1))
    when = (propagate(SIX, b.tokens).candidates + 1.5 * noise).long()
    arms = settling_correlation(Scheduled(b, when), b, 9, n_shuffles=20).set_index("arm")
    assert arms["low"]["observed"] > arms["high"]["shuffled"]
    assert abs(arms["correlation"]["given candidates"]) < 0.08


def test_partial_correlation_is_that_of_the_residuals():
    generator = np.random.default_rng(0)
    z = generator.normal(size=50)
    x, y = z + generator.normal(size=50), generator.normal(size=50) - z
    residual = lambda v: v - np.polyval(np.polyfit(z, v, 1), z)  # noqa: E731
    assert partial(x, y, z) == pytest.approx(np.corrcoef(residual(x), residual(y))[0, 1])
    assert np.isnan(partial(z, y, z)) and partial(x, y, np.ones(50)) == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_cells_that_all_settle_at_once_have_no_correlation(unique_puzzles):
    m = Scheduled(unique_puzzles, torch.zeros(40, 36))
    arms = settling_correlation(m, unique_puzzles, 3, n_shuffles=5)
    assert arms["correlation"].isna().all() and (arms["n"] == 0).all()


def test_settling_needs_puzzles_with_one_solution(sudoku_toy):
    b = puzzles(SIX, SIX.sample_grids("test", 3), 2)
    with pytest.raises(UsageError, match="unique=True"):
        settling_by_depth(sudoku_toy, b)


# --- belief propagation ---
