"""Scrubbing: what is exchanged, the planted propagation exactly, a null, and what is refused."""

import numpy as np
import pytest
import torch

from loopmdm.analysis.measures import MEASURES
from loopmdm.analysis.measures.mechanism.scrubbing import Scrub, exchange, propagation_scrubbing
from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.planted import naked_singles
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_config

BOARD = BOARDS["sudoku6"]


def boards(n=300, n_clues=18):
    return puzzles(BOARD, BOARD.sample_grids("test", n), n_clues)


def test_partners_are_a_permutation_within_classes_across_boards():
    labels = torch.randint(0, 4, (50, 6), generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(50, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    found = exchange(labels, hidden, seed=2)
    known = found >= 0
    assert not known[~hidden].any() and known[hidden].float().mean() > 0.9
    other = found[known]
    assert len(other.unique()) == len(other)  # every state once
    assert torch.equal(labels.flatten()[other], labels[known]) and hidden.flatten()[other].all()
    assert (other // 6 != known.nonzero()[:, 0]).all()
    assert not torch.equal(found, exchange(labels, hidden, seed=3))
    alone = torch.arange(300).view(50, 6)
    assert (exchange(alone, hidden) == -1).all()


def test_the_planted_model_is_scrubbed_by_its_own_round_and_by_no_other():
    m, b = naked_singles(BOARD), boards(150)
    frame = propagation_scrubbing(m, b, 4, Scrub((0, 1), (0, 1, 2), hidden_singles=False))
    for (loop, number, arm), row in frame.set_index(["loop", "round", "arm"]).iterrows():
        if arm == "candidates" and number == loop:
            assert abs(row["cost"]) < 1e-5 and row["kl"] < 1e-5 and row["partners"] > 0.5, (loop, number)
            assert row["recovered"] == pytest.approx(1.0, abs=1e-4) and row["changed"] == 0
        else:
            assert row["kl"] > 5e-4 and row["kl"] > 2 * row["kl_se"], (loop, number, arm)
        if arm == "candidates" and number < loop:
            assert row["cost"] > 4 * row["cost_se"] > 0 and row["recovered"] < 0.99
        if arm == "any":
            assert row["recovered"] == 0 and row["changed"] > 0.1
    other = propagation_scrubbing(m, b, 3, Scrub((1,), (1,), False, same_place=False)).iloc[0]
    assert other["cost"] > 4 * other["cost_se"] and other["partners"] > 0.9  # the place is part of the state


def test_cost_and_share_by_hand():
    """One pair of boards in which one class has two cells: the exchange written out."""
    m, b = naked_singles(BOARD), boards(40)
    frame = propagation_scrubbing(m, b, 3, Scrub((1,), (1,), False, seed=4, batch_size=7))
    again = propagation_scrubbing(m, b, 3, Scrub((1,), (1,), False, seed=4, batch_size=40))
    np.testing.assert_allclose(
        frame.select_dtypes("number").to_numpy(), again.select_dtypes("number").to_numpy(), atol=1e-6
    )
    arms = frame.set_index("arm")
    whole = arms.loc["any", "cost"]
    for arm in ("candidates", "truth", "number"):
        assert arms.loc[arm, "recovered"] == pytest.approx(1 - arms.loc[arm, "cost"] / whole)
        assert arms.loc[arm, "kept"] == pytest.approx(1 - arms.loc[arm, "kl"] / arms.loc["any", "kl"])
    intact = arms["loss"] - arms["cost"]
    assert intact.to_numpy() == pytest.approx(intact.iloc[0])


def test_in_an_untrained_model_there_is_nothing_to_recover():
    shape = {"d_vocab": 7, "n_ctx": 36, "initializer_range": 0.02}
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        m = HookedLoopMDM(LoopMDM(toy_config(**shape)).eval())
        found.append(propagation_scrubbing(m, boards(100), 2, Scrub((0, 1), (1,))))
    frame = np.concatenate(
        [one[one["arm"] == "any"][["cost", "cost_se", "recovered"]].to_numpy() for one in found]
    )
    assert (abs(frame[:, 0]) < 0.01).all() and np.isnan(frame[:, 2]).all()


def test_what_is_wrong_is_said_in_a_line(hooked, batch):
    m, b = naked_singles(BOARD), boards(4)
    for call, said in (
        (lambda: propagation_scrubbing(hooked, batch), "scrubbing needs a Sudoku model"),
        (lambda: propagation_scrubbing(m, b.rows(slice(0, 1))), "two boards at least"),
        (lambda: propagation_scrubbing(m, b, 2, Scrub((2,))), "loops run from 0 to 1, got 2"),
        (lambda: Scrub(rounds=()), "rounds is empty"),
        (lambda: Scrub(rounds=(-1,)), "round must be at least 0"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
    assert MEASURES["propagation-scrubbing"].on == "Sudoku"
