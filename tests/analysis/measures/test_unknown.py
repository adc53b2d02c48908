"""Where nobody knows what is hidden: what needs it says so, all else goes on working."""

from dataclasses import replace

import pytest
import torch

from loopmdm.analysis import read_loops, representation_change
from loopmdm.analysis.measures import MEASURES, measure
from loopmdm.analysis.measures.stopping import record_loops
from loopmdm.analysis.report.data import run_of
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.sudoku import BOARDS

HIDDEN = torch.tensor([True, False, False] * 12)
NEEDS = {"attention-toggle", "attention-specifications", "settled", "logit-attribution", "attribution-patching"}
ON_MASKS = sorted({name for name, item in MEASURES.items() if item.on == "masks"} - NEEDS)


@pytest.fixture
def m(sudoku_toy):
    return HookedLoopMDM(sudoku_toy)


@pytest.fixture
def solved(m) -> MaskedBatch:
    grids = BOARDS["sudoku6"].sample_grids("test", 4)
    return MaskedBatch(grids.masked_fill(HIDDEN, 6), grids, HIDDEN.expand_as(grids).clone())


@pytest.fixture
def puzzle(m, solved) -> MaskedBatch:
    return m.mask(solved.tokens)


def test_a_loss_and_read_outs_of_the_truth_name_the_remedy(m, puzzle, solved):
    for ask in (
        lambda b: m(b, 2, return_type="loss"),
        lambda b: m.loss_fn(m(b, 2), b),
        lambda b: m.unrolled(2)(b, return_type="loss"),
        lambda b: read_loops(m, b, 2),
        lambda b: record_loops(m, b, max_loops=2),
        *(lambda b, name=name: measure(name, m, 2, batch=b) for name in NEEDS),
    ):
        with pytest.raises(
            UsageError, match="unknown at 48 of 48 masked positions; give it too: MaskedBatch"
        ) as said:
            ask(puzzle)
        assert "\n" not in str(said.value)
        ask(replace(puzzle, clean=solved.clean))


def test_one_unknown_cell_is_enough(m, solved):
    clean = solved.clean.clone()
    clean[0, 0] = 6
    with pytest.raises(UsageError, match="unknown at 1 of 48"):
        m(replace(solved, clean=clean), 2, return_type="loss")


@pytest.mark.parametrize("name", ON_MASKS)
def test_measures_that_do_not_look_at_it_say_the_same(name, m, puzzle, solved):
    unknown, known = (measure(name, m, 2, batch=b) for b in (puzzle, solved))
    if name == "representation-change":
        asks = known["metric"].str.contains("p_true|accuracy")
        assert asks.sum() == 8 and unknown.loc[asks, "value"].isna().all() and (unknown.loc[asks, "n"] == 0).all()
        assert known.loc[asks, "value"].notna().all()
        unknown, known = unknown[~asks], known[~asks]
    assert unknown.equals(known)


def test_of_a_batch_only_what_is_known_is_averaged(m, solved):
    """p(true) over the sequences whose answer is known, whatever the batch size."""
    clean = solved.clean.clone()
    clean[0, 0] = 6
    mixed, rest = replace(solved, clean=clean), solved.rows(slice(1, None))
    for size in (1, 4):
        found, expected = (representation_change(m, b, 2, batch_size=size) for b in (mixed, rest))
        rows = found["metric"] == "p_true"
        assert (found.loc[rows, "n"] == 3).all()
        assert found.loc[rows, "value"].tolist() == pytest.approx(expected.loc[rows, "value"].tolist())


def test_the_explorer_shows_answers_without_it(m, puzzle, solved):
    _, cache = m.run_with_cache(puzzle.tokens, n_loops=2)
    known, unknown, without = (run_of(cache, b).answers for b in (solved, puzzle, None))
    assert known and "p_true" in known and "correct" in known
    assert unknown == without and "p_true" not in unknown
    assert unknown["entropy"] == known["entropy"]
