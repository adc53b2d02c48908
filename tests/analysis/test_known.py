"""Known answers: planted solvers and belief propagators are recovered, and so is what they are not."""

import itertools

import numpy as np
import pytest
import torch

from analysis.evaluations.likelihoods import excess_kl
from analysis.evaluations.solving import solve_rate
from analysis.evaluations.subject import Subject
from analysis.known import (
    belief_rounds,
    beliefs,
    best_rounds,
    boards_after_loops,
    boards_by_loop,
    order_interaction,
    settling_by_depth,
    settling_correlation,
)
from analysis.known.boards import board_of, violations
from analysis.known.orders import RankedOrder, _contrast, _places
from analysis.known.settling import NEVER, partial, settled_at
from loopmdm_model import stats
from loopmdm_model.data.propagation import propagate, unique
from loopmdm_model.data.puzzles import puzzles
from loopmdm_model.data.sudoku import BOARDS
from loopmdm_model.data.trees import TREE_TASKS, TreeModel, binary_tree
from loopmdm_model.errors import UsageError
from loopmdm_model.evaluation import TestSet, load_test_set, solve_one_shot
from loopmdm_model.hooked import HookedLoopMDM
from loopmdm_model.likelihood import draw_masks
from loopmdm_model.masking import hide, mask_tokens
from loopmdm_model.sampling import sample
from tests.conftest import toy_config, toy_model

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


@pytest.fixture(scope="module")
def unique_puzzles():
    return puzzles(SIX, SIX.sample_grids("test", 40), 14, unique=True)


@pytest.fixture(scope="module")
def sudoku_toy():
    return toy_model(seed=3, d_vocab=7, n_ctx=36, initializer_range=0.6)


# --- boards ---


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


SMALL = [
    TreeModel(binary_tree(3), 2, 0.8),
    TreeModel((-1, 0, 1, 2, 3), 3, 0.7),
    TreeModel((-1, 0, 0, 0, 2), 3, 0.9),
]


def distances(task):
    """Number of edges between any two nodes."""
    reach = np.full((task.n_nodes, task.n_nodes), task.n_nodes)
    np.fill_diagonal(reach, 0)
    for child, parent in enumerate(task.parents):
        if parent >= 0:
            reach[child, parent] = reach[parent, child] = 1
    for middle in range(task.n_nodes):
        reach = np.minimum(reach, reach[:, [middle]] + reach[[middle]])
    return reach


def enumerated(task, tokens, masked):
    """Posterior of every node by running through all states."""
    total = np.zeros((task.n_nodes, task.n_states))
    for states in itertools.product(range(task.n_states), repeat=task.n_nodes):
        if any(not hidden and states[i] != tokens[i] for i, hidden in enumerate(masked)):
            continue
        chance = 1.0
        for node, parent in enumerate(task.parents[1:], start=1):
            chance *= task.transition[states[parent], states[node]]
        total[np.arange(task.n_nodes), list(states)] += chance
    return total / total.sum(-1, keepdims=True)


@pytest.mark.parametrize("task", SMALL)
def test_a_belief_is_the_posterior_of_what_lies_within_its_rounds(task):
    tokens = task.sample(4, seed=1)
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    far = distances(task)
    for step, belief in enumerate(beliefs(task, tokens, masked, task.n_nodes)):
        for row, node in itertools.product(range(4), range(task.n_nodes)):
            known = ~masked[row].numpy() & (far[node] <= step)
            expected = enumerated(task, tokens[row].tolist(), ~known)[node]
            np.testing.assert_allclose(belief[row, node], expected, atol=1e-12)


def passed(task, tokens, masked, n):
    """Beliefs after n rounds of parallel message passing, message by message."""
    edges = [(p, c) for c, p in enumerate(task.parents) if p >= 0]
    edges += [(c, p) for p, c in edges]
    evidence = [np.ones(task.n_states) if masked[i] else np.eye(task.n_states)[t] for i, t in enumerate(tokens)]
    messages = {edge: np.ones(task.n_states) for edge in edges}

    def heard(node, but):
        parts = [messages[s, t] for s, t in edges if t == node and s != but]
        return np.prod([evidence[node], *parts], axis=0)

    for _ in range(n):
        messages = {(s, t): (out := task.transition @ heard(s, t)) / out.sum() for s, t in edges}
    return np.array([heard(node, None) / heard(node, None).sum() for node in range(task.n_nodes)])


@pytest.mark.parametrize("name", ["tree", "markov"])
def test_beliefs_reach_the_posterior_after_their_hops(name):
    task = TREE_TASKS[name]
    tokens = task.sample(6, seed=3)
    b = mask_tokens(tokens, task.n_states, mask_ratio=0.8, maskable=task.maskable)
    exact, hops = task.posterior(tokens, b.masked), task.hops(b.masked)
    most, off = int(hops.max()), []
    for step, belief in enumerate(beliefs(task, tokens, b.masked, most)):
        done = hops <= step
        torch.testing.assert_close(belief[done], exact[done], atol=1e-10, rtol=0)
        off.append(float((belief - exact).abs().max()))
        if step < 4:
            np.testing.assert_allclose(belief[0], passed(task, tokens[0].tolist(), b.masked[0], step), atol=1e-10)
    assert most > 3 and off[0] > 0.1 and off[-1] < 1e-10


class Propagator:
    """After loop i it answers with the belief after offset + pace * i rounds."""

    def __init__(self, task, pace, offset=1):
        self.task, self.pace, self.offset = task, pace, offset
        self.cfg = toy_config(d_vocab=task.n_states + 1, n_ctx=task.n_nodes)

    def states(self, tokens, n_loops, attention_mask=None):
        for loop in range(n_loops):
            yield loop, tokens

    def readout(self, loop, tokens, *, rows):
        masked = tokens == self.cfg.mask_token_id
        *_, belief = beliefs(self.task, tokens, masked, self.offset + self.pace * loop)
        log = belief[rows].log()
        return torch.cat([log, torch.full((len(log), 1), float("-inf"))], dim=1)


@pytest.fixture(scope="module")
def tree_batch():
    task = TREE_TASKS["tree"]
    return mask_tokens(task.sample(30, seed=0), 4, mask_ratio=1.0, maskable=task.maskable)


@pytest.mark.parametrize(("pace", "offset"), [(1, 1), (2, 1), (0, 0), (1, 3)])
def test_the_pace_of_a_propagator_is_found(tree_batch, pace, offset):
    task = TREE_TASKS["tree"]
    frame = best_rounds(Propagator(task, pace, offset), tree_batch, "tree", n_loops=3)
    assert frame["best_round"].tolist() == [offset + pace * loop for loop in range(3)]
    np.testing.assert_allclose(frame["kl"], 0, atol=1e-9)
    assert (frame["gap"] > 3 * frame["gap_se"]).all() and (frame["share"] > 0.9).all() and (frame["n"] == 30).all()


def test_the_matrix_ends_in_the_excess_over_the_exact_posterior():
    task = TREE_TASKS["tree"]
    model = toy_model(d_vocab=5, n_ctx=63)
    tokens = task.sample(12, seed=1)
    b = draw_masks(tokens, 4, task.maskable.expand_as(tokens), 0, 0)
    frame = belief_rounds(model, b, task, n_loops=2, least_hops=0, batch_size=5)
    subject = Subject("toy", model, None, TestSet("tree", tokens, None, float("nan"), task.maskable))
    excess = excess_kl(subject, [1, 2], 1)
    excess["total"] = excess["excess_kl"] * excess["n_nodes"]
    by_loop = excess.groupby("n_loops")[["total", "n_nodes"]].sum()
    last = frame[frame["round"] == frame["round"].max()].set_index("loop")
    np.testing.assert_allclose(last["kl"], by_loop["total"] / by_loop["n_nodes"], rtol=1e-6)
    assert (last["n_nodes"] == by_loop["n_nodes"].to_numpy()).all()
    assert (frame[["kl", "kl_reverse"]] >= 0).all(axis=None)


def test_divergences_by_hand(tree_batch):
    task = TREE_TASKS["tree"]
    frame = belief_rounds(Propagator(task, 0, 0), tree_batch, task, n_loops=1, n_rounds=2, least_hops=3)
    chosen = (task.hops(tree_batch.masked) >= 3) & tree_batch.masked
    *_, belief = beliefs(task, tree_batch.tokens.clamp(max=3), tree_batch.masked, 2)
    p = belief[chosen].numpy()
    row = frame[frame["round"] == 2].iloc[0]  # the model answers with 1/4 throughout
    assert row["kl"] == pytest.approx((p * np.log(p / 0.25)).sum(-1).mean())
    assert row["kl_reverse"] == pytest.approx((0.25 * np.log(0.25 / p)).sum(-1).mean())
    assert row["n_nodes"] == int(chosen.sum())


def test_batches_and_clusters_of_belief(tree_batch):
    m = toy_model(d_vocab=5, n_ctx=63)
    one, many = (belief_rounds(m, tree_batch, "tree", n_loops=2, batch_size=size) for size in (64, 7))
    np.testing.assert_allclose(one, many, rtol=1e-4)
    assert (one["n"] == 30).all() and (one["standard_error"] > 0).all()
    pairs = np.arange(30) // 2
    assert not np.allclose(belief_rounds(m, tree_batch, "tree", 2, clusters=pairs)["standard_error"],
                           one["standard_error"], rtol=1e-3)  # fmt: skip


def test_nodes_that_nobody_is_as_deep_as_give_nan(tree_batch):
    model = toy_model(d_vocab=5, n_ctx=63)
    frame = belief_rounds(model, tree_batch, "tree", n_loops=1, least_hops=40)
    assert frame["kl"].isna().all() and (frame["n"] == 0).all() and (frame["n_nodes"] == 0).all()
    best = best_rounds(model, tree_batch, "tree", n_loops=1, least_hops=40)
    assert best["best_round"].isna().all() and (best["n"] == 0).all()


def test_other_tasks_are_refused(tree_batch, batch, hooked):
    model = toy_model(d_vocab=5, n_ctx=63)
    with pytest.raises(UsageError, match="did you mean tree"):
        belief_rounds(model, tree_batch, "trees")
    with pytest.raises(UsageError, match="32 positions"):
        belief_rounds(model, tree_batch, "markov")
    with pytest.raises(UsageError, match="vocabulary of 3"):
        belief_rounds(toy_model(d_vocab=3, n_ctx=63), tree_batch, "tree")


# --- orders ---


def test_cells_are_filled_by_depth(sudoku_toy, unique_puzzles):
    b = unique_puzzles.rows(slice(0, 5))
    depth = propagate(SIX, b.tokens).depth
    for order, sign in (("deepest-first", -1), ("shallowest-first", 1)):
        r = sample(
            sudoku_toy, clues=b, steps=36, n_loops=1, order=RankedOrder(_places(SIX, b, order)), temperature=0
        )
        for row in range(5):
            cells = r.events[r.events[:, 1] == row][:, 2].tolist()
            level = [(sign * int(depth[row, cell]) if depth[row, cell] > 0 else sign * 99, cell) for cell in cells]
            assert level == sorted(level) and len(cells) == int(b.masked[row].sum())


def test_rates_and_contrasts_are_those_of_the_solve_rate():
    subject = Subject.load("sudoku-loop")
    orders = ("confidence", "row-major", "one-shot")
    expected = solve_rate(subject, [1, 6], n_clues=[18], orders=orders, n=12).set_index(["order", "n_loops"])
    b = puzzles(SIX, load_test_set("sudoku6", 36, None).tokens[:12], 18)
    found = order_interaction(subject.model, b, (1, 6), orders, batch_size=200)
    for row in found.rates.itertuples():
        assert row.solve_rate == expected["solve_rate"][row.order, row.n_loops]
        assert (row.low, row.high) == tuple(expected.loc[(row.order, row.n_loops), ["low", "high"]])
    for row in found.contrasts.itertuples():
        assert row.contrast == pytest.approx(expected["interaction"][row.order, 6])
        assert row.standard_error == pytest.approx(expected["interaction_se"][row.order, 6])
        assert row.gain == pytest.approx(expected["gain"][row.order, 6]) and row.n == 12
    assert found.contrasts["order"].tolist() == ["row-major", "one-shot"]


def test_a_contrast_by_hand():
    solved = {
        ("row", 4): [1, 1, 0, 1],
        ("row", 1): [0, 0, 0, 1],
        ("confidence", 4): [1, 1, 1, 0],
        ("confidence", 1): [1, 0, 1, 0],
    }
    arrays = {key: np.array(value, dtype=float) for key, value in solved.items()}
    gain, _, other, contrast, error, low, high, log_odds, log_odds_se, n = _contrast(arrays, "row", 4, 1, None)
    assert (gain, other, contrast, n) == (0.5, 0.25, 0.25, 4)  # row +1 +1 0 0, confidence 0 +1 0 0
    assert error == pytest.approx(0.25) and high - contrast == pytest.approx(0.25 * stats.t95(4)) == contrast - low
    assert log_odds == pytest.approx(np.log(3) - np.log(1 / 3) - np.log(3) + np.log(1)) and log_odds_se > 0
    arrays["confidence", 4][:] = 1
    assert np.isnan(_contrast(arrays, "row", 4, 1, None)[7:9]).all()


def test_the_log_odds_error_is_that_of_many_experiments():
    generator = np.random.default_rng(0)
    rates = {("row", 4): 0.7, ("row", 1): 0.3, ("confidence", 4): 0.8, ("confidence", 1): 0.6}
    luck = generator.normal(size=(150, 300))  # shared by the arms of a puzzle: they are paired
    truth = np.log(7 / 3) * 2 - np.log(4) + np.log(1.5)
    values = []
    for run in luck:
        own = {key: 0.7 * run + generator.normal(size=300) * np.sqrt(0.51) for key in rates}
        arms = {key: (v < np.quantile(luck, rates[key])).astype(float) for key, v in own.items()}
        values.append(_contrast(arms, "row", 4, 1, None)[7:9])
    value, error = np.array(values).T
    assert value.mean() == pytest.approx(truth, abs=0.1) and value.std() == pytest.approx(error.mean(), rel=0.2)


def test_two_loop_counts_and_known_orders_are_needed(sudoku_toy, unique_puzzles):
    b = unique_puzzles.rows(slice(0, 2))
    with pytest.raises(UsageError, match="two loop counts"):
        order_interaction(sudoku_toy, b, (3,))
    with pytest.raises(UsageError, match="unknown order"):
        order_interaction(sudoku_toy, b, orders=("hardest",))
    full = mask_tokens(b.clean, 6, mask_ratio=0.0)
    with pytest.raises(UsageError, match="hides no cell"):
        order_interaction(sudoku_toy, full)
