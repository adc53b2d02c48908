"""How far constraint propagation alone gets on a Sudoku board, and in how many rounds.

In a round every open cell is looked at at once, on the board of the round before. A symbol is a candidate of an
open cell if no cell of its row, column or box holds it, and a cell is filled if

    naked single    it has one candidate left, or
    hidden single   one of its candidates fits nowhere else in its row, column or box.

The `depth` of a cell is the round, from 1, in which it is filled: the length of the chain of deductions. Both
rules are sound, so what they fill is the same in every completion of the board; what is left needs search.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.tasks.solver import EMPTY, is_unique
from loopmdm.model.tasks.sudoku import Board


@cache
def units(board: Board) -> Bool[Tensor, "unit cell"]:
    """Which cells each row, column and box (in this order) holds; every unit holds `size` of them."""
    cell = torch.arange(board.n_cells)
    row, column = cell // board.size, cell % board.size
    box = row // board.box_rows * board.box_rows + column // board.box_columns
    return torch.cat([torch.arange(board.size)[:, None] == kind for kind in (row, column, box)])


@cache
def peers(board: Board) -> Bool[Tensor, "cell cell"]:
    """Which cells share a row, column or box with which others."""
    member = units(board).float()
    return (member.T @ member > 0).fill_diagonal_(False)


@dataclass(frozen=True)
class Propagation:
    """`depth` [batch, cell]: 0 for clues, the round for what is derived, -1 for what needs search.

    `symbols` [batch, cell]: clues and derived cells, EMPTY = -1 where open; `candidates` [batch, cell]: how many
    symbols a cell may hold as far as the clues next to it say, 0 for clues.
    """

    depth: Int[Tensor, "batch cell"]
    symbols: Int[Tensor, "batch cell"]
    candidates: Int[Tensor, "batch cell"]

    @property
    def solved(self) -> Bool[Tensor, " batch"]:
        """Whether propagation alone fills the board; it has one completion then."""
        return (self.depth >= 0).all(-1)


def propagate(board: Board, cells: Int[Tensor, "batch cell"], hidden_singles: bool = True) -> Propagation:
    """Run rounds of naked (and hidden) singles on every board until nothing is added.

    `cells` are ids row by row: symbols 0..size - 1; [MASK] = size or EMPTY = -1 where open. UsageError on boards
    that turn out to have no completion.
    """
    known = _known(board, cells)
    member = units(board).float()
    depth = torch.where(known.any(-1), 0, EMPTY)
    first = _candidates(known, member).sum(-1)
    for step in range(1, board.n_cells + 2):
        new = _singles(board, known, member, hidden_singles)
        if not bool(new.any()):
            break
        known = known | new
        depth = depth.masked_fill(new.any(-1), step)
    symbols = torch.where(known.any(-1), known.int().argmax(-1), EMPTY)
    return Propagation(depth, symbols, first)


def candidates_by_round(
    board: Board, cells: Int[Tensor, "batch cell"], n_rounds: int, hidden_singles: bool = True
) -> Bool[Tensor, "round batch cell symbol"]:
    """What each cell may still hold after 0, 1, .. `n_rounds` rounds of filling.

    Of a filled cell its symbol alone; of an open one all that its row, column and box do not hold. UsageError as
    in `propagate`.
    """
    check_count("n_rounds", n_rounds, least=0)
    known, member = _known(board, cells), units(board).float()
    found = []
    for _ in range(n_rounds + 1):
        found.append(known | _candidates(known, member))
        known = known | _singles(board, known, member, hidden_singles)
    return torch.stack(found)


def unique(board: Board, cells: Int[Tensor, "batch cell"]) -> Bool[Tensor, " batch"]:
    """Which boards have exactly one completion: by propagation where it is enough, else by search from there."""
    reached = propagate(board, cells)
    known = [
        solved or is_unique(board.box_rows, board.box_columns, symbols)
        for solved, symbols in zip(reached.solved.tolist(), reached.symbols.tolist(), strict=True)
    ]
    return torch.tensor(known, dtype=torch.bool)


def _known(board: Board, cells: Tensor) -> Bool[Tensor, "batch cell symbol"]:
    if cells.ndim != 2 or cells.shape[1] != board.n_cells:
        raise UsageError(f"{board.name} boards are [batch, {board.n_cells}] cells, got shape {list(cells.shape)}")
    cells = cells.cpu()
    if bool(((cells < EMPTY) | (cells > board.size)).any()):
        raise UsageError(f"cells must hold symbols 0..{board.size - 1}, or {board.size} or {EMPTY} where open")
    return cells[..., None] == torch.arange(board.size)


def _candidates(
    known: Bool[Tensor, "batch cell symbol"], member: Float[Tensor, "unit cell"]
) -> Bool[Tensor, "batch cell symbol"]:
    held = torch.einsum("uc,bcs->bus", member, known.float())
    seen = torch.einsum("uc,bus->bcs", member, held) > 0
    return ~known.any(-1, keepdim=True) & ~seen


def _singles(
    board: Board, known: Tensor, member: Float[Tensor, "unit cell"], hidden: bool
) -> Bool[Tensor, "batch cell symbol"]:
    """What one round fills."""
    possible = _candidates(known, member)
    _check_consistent(board, known, possible, member)
    single = possible & (possible.sum(-1, keepdim=True) == 1)
    if hidden:
        alone = torch.einsum("uc,bcs->bus", member, possible.float()) == 1
        single = single | possible & (torch.einsum("uc,bus->bcs", member, alone.float()) > 0)
    found = torch.nn.functional.one_hot(single.int().argmax(-1), board.size).bool()
    return found & single.any(-1)[..., None]


def _check_consistent(board: Board, known: Tensor, possible: Tensor, member: Tensor) -> None:
    """No symbol twice in a unit, a place for each symbol in each unit, and a candidate for each open cell."""
    held = torch.einsum("uc,bcs->bus", member, known.float())
    places = held + torch.einsum("uc,bcs->bus", member, possible.float())
    stuck = ~known.any(-1) & ~possible.any(-1)
    wrong = (held > 1).flatten(1).any(-1) | (places < 1).flatten(1).any(-1) | stuck.any(-1)
    if bool(wrong.any()):
        number = int(wrong.nonzero()[0, 0])
        raise UsageError(f"{board.name} board {number} has no completion; hide cells of a solved grid instead")
