"""Solved Sudoku grids of three sizes, split by canonical form so that no board leaks under another name.

A grid's canonical form renames symbols so that its first row reads 1..n. 6x6 has 28,200,960 grids in only
39,168 such classes (4x4: 288 in 12), so a random split would leak. Here classes are split, at most half of
them for training, and a grid is a class with a random relabelling, which makes grids uniform within a split.
9x9 has too many classes to list: there a pool is made by seeded search and by the board's symmetries, and a
grid's split is a function of what no symmetry changes. Boxes are 2x2, 2x3 and 3x3 (rows x columns).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from loopmdm.model.errors import UsageError, unknown_name
from loopmdm.model.randomness import row_uniforms, step_generator
from loopmdm.model.tasks.solver import EMPTY, completions

Split = Literal["train", "validation", "test"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Board:
    """A size of Sudoku; `classes` says how many go into training, validation and test."""

    name: str
    box_rows: int
    box_columns: int
    classes: dict[str, int]

    @property
    def size(self) -> int:
        """Symbols; also cells of a row, a column or a box."""
        return self.box_rows * self.box_columns

    @property
    def n_cells(self) -> int:
        """Cells of a board."""
        return self.size**2

    def is_valid(self, grids: Int[Tensor, "batch cell"]) -> Bool[Tensor, " batch"]:
        """Whether every row, column and box of each grid holds every symbol once."""
        size, rows, columns = self.size, self.box_rows, self.box_columns
        boards = grids.view(-1, size, size)
        boxes = boards.view(-1, size // rows, rows, size // columns, columns)
        boxes = boxes.transpose(2, 3).reshape(-1, size, size)
        units = torch.cat([boards, boards.transpose(1, 2), boxes], dim=1)
        return (units.sort(-1).values == torch.arange(size, device=grids.device)).all(-1).all(-1)

    def canonical(self, grids: Int[Tensor, "batch cell"]) -> Int[Tensor, "batch cell"]:
        """Canonical form: symbols renamed so that the first row reads 0..size - 1."""
        names = torch.empty(len(grids), self.size, dtype=torch.long)
        names.scatter_(1, grids[:, : self.size], torch.arange(self.size).expand(len(grids), self.size))
        return names.gather(1, grids)

    def is_written(self, given: Any) -> bool:
        """Whether `given` is a board or several as people write them (see `read`), and not ids of another width.

        Tensors hold ids unless they have rows: [size, size] or [n, size, size].
        """
        if isinstance(given, str):
            return True
        cells = _cells(given)
        if cells is None:
            return True
        rows = cells.shape[-2:] == (self.size, self.size)
        return rows or (not isinstance(given, Tensor) and (cells.dtype.kind not in "iu" or self._is_flat(cells)))

    def _is_flat(self, cells: np.ndarray) -> bool:
        return cells.ndim in (1, 2) and cells.shape[-1] == self.n_cells

    def find(self, given: Any) -> Int[Tensor, "n cell"] | None:
        """As `read`; None for what is no board: ids of another width, texts that make up no whole one."""
        if not self.is_written(given):
            return None
        texts = isinstance(given, Sequence) and all(isinstance(text, str) for text in given)
        if texts and (not given or sum(len(self.ids(text)) for text in given) % self.n_cells):
            return None
        return self.read(given)

    def read(self, given: Any) -> Int[Tensor, "n cell"]:
        """A board or several as people write them, as ids 0..size - 1 with -1 where a cell is empty.

        A text (rulers and line breaks do not count), texts, or integers: rows [size, size] of symbols 1..size with
        0, "." or -1 for an empty cell; boards written flat, [cell] or [n, cell], may also hold ids with -1 where
        empty. UsageError names what is no symbol.
        """
        if isinstance(given, str):
            return self._whole(self.ids(given))
        cells = _cells(given)
        if cells is None or cells.dtype.kind not in "iuUO":
            shown = " ".join(repr(given).split())
            raise UsageError(f"{self.name} is read from a text or rows of integers, got {shown:.60}")
        if cells.dtype.kind in "UO":
            words = [str(cell) for cell in cells.ravel().tolist()]
            return self._whole(self.ids(" ".join("." if word == "-1" else word for word in words)))
        flat, shape = self._is_flat(cells), list(cells.shape)
        if not flat and shape[-2:] != [self.size] * 2:
            raise UsageError(f"{self.name} has {self.size} rows of {self.size} cells, got shape {shape}")
        boards = cells.astype(np.int64).reshape(-1, self.n_cells)
        if flat and self._holds_ids(boards):
            return torch.from_numpy(boards)
        return self._from_symbols(boards)

    def _holds_ids(self, boards: Int[np.ndarray, "n cell"]) -> bool:
        """Whether boards written flat hold ids: -1 is empty and no symbol `size` occurs, or all are complete."""
        if (boards == self.size).any() or (boards < -1).any() or (boards > self.size).any():
            return False
        complete = bool(self.is_valid(torch.from_numpy(boards)).all())
        return bool((boards == -1).any()) or not (boards == 0).any() or complete

    def _from_symbols(self, boards: Int[np.ndarray, "n cell"]) -> Int[Tensor, "n cell"]:
        if (boards == -1).any() and (boards == 0).any():
            raise UsageError(
                f"{self.name}: 0 and -1 occur; write symbols 1..{self.size} and one mark for an empty cell"
            )
        for row, cell in np.argwhere((boards < -1) | (boards > self.size))[:1].tolist():
            raise self._no_symbol(str(boards[row, cell]), cell // self.size, cell % self.size)
        return torch.from_numpy(np.where(boards > 0, boards - 1, EMPTY))

    def ids(self, text: str) -> list[int]:
        """Ids of the symbols in text of any length, -1 for "0", "." and [MASK]; spaces and rulers are skipped."""
        lines = [line for line in text.replace("[MASK]", ".").splitlines() if line.strip(" -+|=")]
        found = []
        for row, line in enumerate(lines):
            for column, word in enumerate(word for word in line if not (word.isspace() or word == "|")):
                symbol = int(word) if word in "0123456789" else 0 if word == "." else -1
                if not 0 <= symbol <= self.size:
                    raise self._no_symbol(word, row, column)
                found.append(symbol - 1)
        return found

    def _whole(self, ids: list[int]) -> Int[Tensor, "n cell"]:
        if not ids or len(ids) % self.n_cells:
            raise UsageError(f"{self.name} has {self.n_cells} cells, got {len(ids)}; mark empty ones with 0 or .")
        return torch.tensor(ids).view(-1, self.n_cells)

    def _no_symbol(self, word: str, row: int, column: int) -> UsageError:
        place = f"row {row + 1}, column {column + 1}"
        return UsageError(
            f"{word!r} in {place} is no symbol of {self.name}: write 1..{self.size}, and 0 or . for an empty cell"
        )

    @cache  # noqa: B019 - a handful of boards that live as long as the program
    def all_classes(self) -> UInt8[np.ndarray, "grid cell"]:
        """Every class of a 4x4 or 6x6 board as its canonical grid, in lexicographic order."""
        size = self.size
        rows = np.array(list(permutations(range(size))), dtype=np.uint8)
        by_column = (rows[:, None, :] != rows[None, :, :]).all(-1)
        marks = (1 << rows.reshape(-1, size // self.box_columns, self.box_columns).astype(int)).sum(-1)
        by_box = ((marks[:, None, :] & marks[None, :, :]) == 0).all(-1)
        grids = np.zeros((1, 1), dtype=int)
        for row in range(1, size):
            fits = by_column[grids].all(1)
            for above in range(row // self.box_rows * self.box_rows, row):
                fits &= by_box[grids[:, above]]
            grid, new = np.nonzero(fits)
            grids = np.column_stack([grids[grid], new])
        assert len(grids) == sum(self.classes.values())
        return rows[grids].reshape(len(grids), self.n_cells)

    @cache  # noqa: B019
    def pool(self, split: Split) -> UInt8[np.ndarray, "grid cell"]:
        """The canonical grids of one split; the splits are disjoint and fixed for ever."""
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        if self.size > 6:
            return _images(self, split)
        order = step_generator(0, "data").permutation(sum(self.classes.values()))
        start = sum(self.classes[name] for name in SPLITS[: SPLITS.index(split)])
        return self.all_classes()[order[start : start + self.classes[split]]]

    def relabel(
        self, grids: UInt8[np.ndarray, "batch cell"], seed: int, first_index: int = 0
    ) -> Int[Tensor, "batch cell"]:
        """The grids under random relabellings; token id = symbol 0..size - 1."""
        names = row_uniforms(seed, "relabel", len(grids), self.size, first_index=first_index).argsort(-1)
        return names.gather(1, torch.from_numpy(grids).long())

    def sample_grids(self, split: Split, n: int, seed: int = 0) -> Int[Tensor, "n cell"]:
        """`n` solved grids of a split, row by row as token ids; distinct classes while they last."""
        pool = self.pool(split)
        order = step_generator(seed, "order", 1).permutation(len(pool))
        return self.relabel(pool[np.resize(order, n)], seed)


def _cells(given: Any) -> np.ndarray | None:
    """Numbers or words in one array; None for what has no shape."""
    try:
        return np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError):
        return None


N_BASES = 1000
SHARE_OF_SPLIT = {"train": 0.5, "validation": 0.6, "test": 1.0}


def signature(grid: Int[np.ndarray, "9 9"]) -> str:
    """What relabelling, transposing, and permuting bands, stacks, rows and columns leave unchanged.

    Two rows of a band make a permutation of the symbols; its cycle lengths survive all of these.
    """

    def side(lines: np.ndarray) -> list:
        bands = [lines[start : start + 3] for start in (0, 3, 6)]
        return sorted(sorted(_cycles(a, b) for a, b in combinations(band, 2)) for band in bands)

    return repr(sorted([side(grid), side(grid.T)]))


def _cycles(first: np.ndarray, second: np.ndarray) -> tuple[int, ...]:
    image, lengths, seen = dict(zip(first.tolist(), second.tolist(), strict=True)), [], set()
    for start in image:
        symbol, length = start, 0
        while symbol not in seen:
            seen.add(symbol)
            symbol, length = image[symbol], length + 1
        lengths += [length] if length else []
    return tuple(sorted(lengths))


def split_of(grid: Int[np.ndarray, "9 9"]) -> str:
    """The split a 9x9 grid belongs to; the same for all its images."""
    share = int(hashlib.sha256(f"loopmdm sudoku9: {signature(grid)}".encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name in SPLITS if share < SHARE_OF_SPLIT[name])


@cache
def _bases() -> dict[str, list[np.ndarray]]:
    """Random 9x9 grids found by search, by split."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for number in range(N_BASES):
        generator = step_generator(0, "grids", number)
        grid = np.array(next(completions(3, 3, [EMPTY] * 81, generator)), dtype=np.uint8).reshape(9, 9)
        found[split_of(grid)].append(grid)
    return found


def _images(board: Board, split: Split) -> UInt8[np.ndarray, "grid cell"]:
    """Images of the split's base grids under the symmetries, each base as often as the others."""
    bases, count = _bases()[split], board.classes[split]
    uniforms = row_uniforms(SPLITS.index(split), "grids", count, 25).numpy()
    images = np.empty((count, 9, 9), dtype=np.uint8)
    for number, row in enumerate(uniforms):
        grid = bases[number % len(bases)]
        grid = grid.T if row[24] < 0.5 else grid
        images[number] = grid[_lines(row[:12])][:, _lines(row[12:24])]
    return board.canonical(torch.from_numpy(images.reshape(count, 81)).long()).numpy().astype(np.uint8)


def _lines(uniforms: np.ndarray) -> np.ndarray:
    """An order of nine lines that keeps bands together, from 12 uniforms."""
    within = uniforms[3:].reshape(3, 3).argsort(-1)
    return (3 * np.arange(3)[:, None] + within)[uniforms[:3].argsort()].ravel()


BOARDS = {
    board.name: board
    for board in (
        Board("sudoku4", 2, 2, {"train": 6, "validation": 2, "test": 4}),
        Board("sudoku6", 2, 3, {"train": 12_000, "validation": 2_000, "test": 25_168}),
        Board("sudoku9", 3, 3, {"train": 12_000, "validation": 2_000, "test": 4_000}),
    )
}


def board_of_model(cfg: Any) -> Board | None:
    """The board that a model of this config fills: as many positions as cells, its symbols, then [MASK]."""
    for board in BOARDS.values():
        if (cfg.n_ctx, cfg.d_vocab, cfg.mask_token_id) == (board.n_cells, board.size + 1, board.size):
            return board
    return None
