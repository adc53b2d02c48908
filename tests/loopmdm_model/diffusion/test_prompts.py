"""A start holds what is given where it belongs; boards are read as people write them."""

import numpy as np
import pytest
import torch

from loopmdm.model import HookedLoopMDM, mask_tokens, sample
from loopmdm.model.diffusion.prompts import Start
from loopmdm.model.errors import UsageError
from loopmdm.model.tasks.sudoku import BOARDS, board_of_model
from tests.conftest import toy_config, toy_model

SIX = BOARDS["sudoku6"]
ROWS = [[0, 5, 0, 2, 0, 0], [0, 2, 0, 0, 4, 0], [0, 0, 1, 0, 0, 0], [4, 0, 0, 0, 3, 0], [0, 0, 3, 0, 0, 0],
        [2, 0, 0, 0, 0, 1]]  # fmt: skip
IDS = torch.tensor([[symbol - 1 for row in ROWS for symbol in row]])
PRINTED = """
    . 5 . | 2 . .
    . 2 . | . 4 .
    ------+------
    . . 1 | . . .
    4 . . | . 3 .
    ------+------
    . . 3 | . . .
    2 . . | . . 1
"""
WRITTEN = {
    "rows": ROWS,
    "dots": [[symbol or "." for symbol in row] for row in ROWS],
    "minus one": [[symbol or -1 for symbol in row] for row in ROWS],
    "flat": sum(ROWS, []),  # noqa: RUF017
    "several": [ROWS],
    "uint16": np.array(ROWS, dtype=np.uint16),
    "flat int8": np.array(ROWS, dtype=np.int8).ravel(),
    "tensor": torch.tensor(ROWS),
    "lines": ["".join(map(str, row)) for row in ROWS],
    "text": "\n".join("".join(map(str, row)) for row in ROWS),
    "printed": PRINTED,
}


@pytest.mark.parametrize("given", WRITTEN.values(), ids=list(WRITTEN))
def test_a_board_is_read_however_it_is_written(sudoku, given):
    assert torch.equal(SIX.read(given), IDS)
    start = Start.of(sudoku, clues=given)
    assert torch.equal(start.tokens, IDS.masked_fill(IDS < 0, 6)) and torch.equal(start.free, IDS < 0)


@pytest.fixture(scope="module")
def sudoku():
    return HookedLoopMDM.from_pretrained("sudoku-loop")


def test_ids_stay_ids(sudoku):
    """Flat with -1 where free, complete, or of another width: as for any other model."""
    grid = SIX.sample_grids("test", 2)
    part = grid.masked_fill(torch.arange(36) % 3 > 0, -1)
    for ids, free in ((part, 48), (part.tolist(), 48), (part.numpy(), 48), (grid, 0), (grid.tolist(), 0)):
        start = Start.of(sudoku, clues=ids)
        assert torch.equal(start.tokens[~start.free], torch.as_tensor(ids)[~start.free])
        assert len(start) == 2 and int(start.free.sum()) == free
    assert Start.of(sudoku, clues=[3, -1, 0]).tokens.tolist() == [[3, 6, 0]]


def test_samples_keep_the_clues_of_a_written_board(sudoku):
    r = sample(sudoku, clues=ROWS, steps=3, n_loops=1)
    assert r.tokens.shape == (1, 36) and torch.equal(r.tokens[IDS >= 0], IDS[IDS >= 0])
    assert torch.equal(r.tokens, sample(sudoku, clues=IDS, steps=3, n_loops=1).tokens)


def test_a_board_model_reads_symbols_only(sudoku):
    grid = SIX.sample_grids("test", 1)
    printed = sudoku.to_string(grid[0])
    assert torch.equal(sudoku.to_tokens(printed), grid)
    for complete in (printed, (grid + 1).view(6, 6).tolist(), (grid + 1).numpy(), printed.split()):
        b = sudoku.mask(complete, ratio=0.5)
        assert torch.equal(b.clean, grid) and int(b.masked.sum()) == 18
    assert sudoku.to_tokens("12.3[MASK]").tolist() == [[0, 1, 6, 2, 6]]
    assert sudoku(["123456", "345612"], n_loops=1).shape == (2, 6, 7)  # parts of boards are a batch of texts
    with pytest.raises(UsageError, match="already hold"):
        sudoku.mask(ROWS, ratio=0.5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([[9] * 6] * 6, "'9' in row 1, column 1 is no symbol of sudoku6"),
        (["123456"] * 5 + ["1234x6"], "'x' in row 1, column 35"),
        ("123456\n12345a", "'a' in row 2, column 6"),
        ("1234567", "'7' in row 1, column 7"),
        ("123", "36 cells, got 3"),
        ([[-1, 0, 1, 2, 3, 4]] * 6, "0 and -1"),
        ([[-2] * 6] * 6, "'-2'"),
        ([[1.0] * 6] * 6, "text or rows of integers"),
        ([True] * 36, "text or rows of integers"),
        ([[1, 2], [3]], "text or rows of integers"),
    ],
)
def test_what_is_no_board_is_refused_by_name(sudoku, given, says):
    with pytest.raises(UsageError, match=says) as caught:
        Start.of(sudoku, clues=given)
    assert "\n" not in str(caught.value)


def test_other_models_are_no_boards():
    assert board_of_model(toy_config()) is None and board_of_model(toy_config(d_vocab=5)).name == "sudoku4"
    with pytest.raises(UsageError, match="clues must be"):
        Start.of(toy_model(), clues="12")


def test_a_padded_prompt_goes_on_where_its_own_text_ends():
    m = HookedLoopMDM.from_pretrained("sotu-loop")
    texts = ["My fellow Americans, the state of our union", "We are"]
    padded = m.to_tokens(texts)
    own = [len(m.to_tokens(text)[0]) for text in texts]
    assert own[1] < own[0] == padded.shape[1] and m.padding_mask(padded) is not None
    from_texts = Start.of(m, texts, length=40)
    assert (~from_texts.free).sum(-1).tolist() == own
    left = torch.stack([padded[0], padded[1].roll(own[0] - own[1])])
    for prompt in (padded, padded.tolist(), left):
        assert torch.equal(Start.of(m, prompt, length=40).tokens, from_texts.tokens)
    r = sample(m, prompt=padded, length=40, steps=3, n_loops=1)
    assert torch.equal(r.tokens, sample(m, prompt=texts, length=40, steps=3, n_loops=1).tokens)


def test_rows_of_a_start():
    model = toy_model()
    start = Start.of(model, clues=torch.tensor([[1, -1, 3], [-1, 5, -1]]))
    assert len(start) == 2 and start.real is None and start.rows(slice(1, 2)).tokens.tolist() == [[22, 5, 22]]
    assert start.rows(slice(1)).free.tolist() == [[False, True, False]]


def test_one_padded_row_serves_any_number(model):
    real = torch.ones(1, 8, dtype=torch.long)
    real[0, 6:] = 0
    b = mask_tokens(torch.arange(8)[None], 22, mask_ratio=0.5, attention_mask=real)
    r = sample(model, 5, clues=b, steps=2, batch_size=2)
    assert torch.equal(r.start, b.tokens.expand(5, -1)) and torch.equal(
        r.tokens[:, 6:], b.clean[:, 6:].expand(5, -1)
    )
    (alone,) = sample(model, 1, clues=b, steps=2, first_index=4).tokens
    assert torch.equal(r.tokens[4], alone)
