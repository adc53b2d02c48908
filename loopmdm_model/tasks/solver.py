"""Completions of a Sudoku board by depth-first search: which there are, one after the other.

The cell with the fewest candidates is filled first. With a generator the candidates are tried in random order,
which makes random grids out of an empty board (not exactly uniform ones: shallow choices weigh more).
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

EMPTY = -1


def completions(
    box_rows: int, box_columns: int, cells: Sequence[int], generator: np.random.Generator | None = None
) -> Iterator[list[int]]:
    """All valid completions of `cells` [row by row; EMPTY = -1 where open], each as a full list of symbols."""
    size = box_rows * box_columns
    places = [(cell // size, cell % size) for cell in range(size * size)]
    boxes = [row // box_rows * box_rows + column // box_columns for row, column in places]
    rows, columns, squares = [0] * size, [0] * size, [0] * size
    board, everything = list(cells), (1 << size) - 1
    order = list(range(size)) if generator is None else generator.permutation(size).tolist()

    def flip(cell: int, bit: int) -> None:
        row, column = places[cell]
        rows[row] ^= bit
        columns[column] ^= bit
        squares[boxes[cell]] ^= bit

    def free(cell: int) -> int:
        row, column = places[cell]
        return everything & ~(rows[row] | columns[column] | squares[boxes[cell]])

    def fill(open_cells: list[int]) -> Iterator[list[int]]:
        if not open_cells:
            yield list(board)
            return
        fewest = min(open_cells, key=lambda cell: free(cell).bit_count())
        left = [cell for cell in open_cells if cell != fewest]
        candidates = free(fewest)
        symbols = order if generator is None else generator.permutation(size).tolist()
        for symbol in symbols:
            if candidates >> symbol & 1:
                flip(fewest, 1 << symbol)
                board[fewest] = symbol
                yield from fill(left)
                flip(fewest, 1 << symbol)
                board[fewest] = EMPTY

    for cell, symbol in enumerate(board):
        if symbol != EMPTY:
            if not free(cell) >> symbol & 1:
                return
            flip(cell, 1 << symbol)
    yield from fill([cell for cell, symbol in enumerate(board) if symbol == EMPTY])


def is_unique(box_rows: int, box_columns: int, cells: Sequence[int]) -> bool:
    """Whether the board has exactly one completion."""
    return len(list(islice(completions(box_rows, box_columns, cells), 2))) == 1
