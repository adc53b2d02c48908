"""Generation orders: rates, contrasts and their errors."""

import numpy as np
import pytest

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.known import order_interaction
from loopmdm.analysis.measures.known.orders import RankedOrder, _contrast, _places
from loopmdm.analysis.measures.quality.solving import solve_rate
from loopmdm.analysis.numbers import stats
from loopmdm.model.diffusion.sampling import sample
from loopmdm.model.errors import UsageError
from loopmdm.model.masking import mask_tokens
from loopmdm.model.tasks.propagation import propagate
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.test_sets import load_test_set

SIX = BOARDS["sudoku6"]


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
    case = Case.of("sudoku-loop")
    orders = ("confidence", "row-major", "one-shot")
    expected = solve_rate(case, [1, 6], n_clues=[18], orders=orders, n=12).set_index(["order", "n_loops"])
    b = puzzles(SIX, load_test_set("sudoku6", 36, None).tokens[:12], 18)
    found = order_interaction(case.m, b, (1, 6), orders, batch_size=200)
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
