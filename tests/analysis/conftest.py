"""Puzzles and a toy that several families of measures share."""

import pytest

from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS
from tests.conftest import toy_model

SIX = BOARDS["sudoku6"]


@pytest.fixture(scope="module")
def unique_puzzles():
    return puzzles(SIX, SIX.sample_grids("test", 40), 14, unique=True)


@pytest.fixture(scope="module")
def sudoku_toy():
    return toy_model(seed=3, d_vocab=7, n_ctx=36, initializer_range=0.6)
