"""What a read-out still considers in each hidden cell of a Sudoku board, beside what propagation still allows.

    p_i(v)     softmax over the board's symbols of the read-out after loop i
    live       p_i(v) > threshold, by default 1 / (2 size): uniform over any set of symbols, each of them has
               1 / size or more, so that a symbol is dead once it has less than half of that
    C_k        candidates after k rounds of filling (`candidates_by_round`)
    excluded   the first round whose C_k lacks the symbol; 0: by the clues alone
    died       the first loop from which on the symbol is dead to the last one

Everything is kept for hidden cells only, [.., row, ..] in reading order, a handful of symbols each.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.known.boards import board_of
from loopmdm.analysis.measures.known.settling import settled_at
from loopmdm.model.errors import UsageError, check_count, check_number
from loopmdm.model.protocol import LoopedModel
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import candidates_by_round, propagate, unique
from loopmdm.model.tasks.sudoku import Board

RULES = {"naked singles": False, "naked and hidden singles": True}
"""Rules of filling, and whether hidden singles are among them."""
NEVER = -1


@dataclass(frozen=True, eq=False)
class Considered:
    """Read-outs of the hidden cells of a batch, its rows: `log_p` [loop, row, symbol], nats."""

    board: Board
    batch: MaskedBatch
    log_p: Float[Tensor, "loop row symbol"]
    threshold: float

    @property
    def hidden(self) -> Bool[Tensor, "batch cell"]:
        """Which cells the rows are."""
        return self.batch.masked.cpu()

    @cached_property
    def owner(self) -> Int[np.ndarray, " row"]:
        """The board of each row."""
        return self.hidden.nonzero()[:, 0].numpy()

    @cached_property
    def truth(self) -> Bool[np.ndarray, "row symbol"]:
        """The solution's symbol."""
        symbols = self.batch.clean.cpu()[self.hidden]
        return (symbols[:, None] == torch.arange(self.board.size)).numpy()

    @cached_property
    def p(self) -> Float[np.ndarray, "loop row symbol"]:
        """Probabilities."""
        return self.log_p.exp().numpy()

    @cached_property
    def live(self) -> Bool[np.ndarray, "loop row symbol"]:
        """What is still considered."""
        return self.p > self.threshold

    @cached_property
    def died(self) -> Int[np.ndarray, "row symbol"]:
        """Loop of death; NEVER = -1 for what is live after the last."""
        return settled_at(~self.live)

    @cached_property
    def filled(self) -> Int[Tensor, "loop batch cell"]:
        """Boards with the best symbol in each hidden cell."""
        boards = self.batch.clean.cpu().expand(len(self.log_p), -1, -1).clone()
        boards[:, self.hidden] = self.log_p.argmax(-1)
        return boards

    @cached_property
    def solved(self) -> Bool[np.ndarray, "loop batch"]:
        """Boards without violation."""
        return torch.stack([self.board.is_valid(now) for now in self.filled]).numpy()


@dataclass(frozen=True, eq=False)
class Allowed:
    """Candidates of the rows of a `Considered` by round, `sets` [round, row, symbol]."""

    sets: Bool[np.ndarray, "round row symbol"]
    owner: Int[np.ndarray, " row"]
    n_boards: int

    @cached_property
    def excluded(self) -> Int[np.ndarray, "row symbol"]:
        """Round of exclusion; NEVER = -1 for what is a candidate to the end."""
        return settled_at(~self.sets)

    @cached_property
    def last(self) -> Int[np.ndarray, " batch"]:
        """The last round that changes a board's sets; 0 where none does: later rounds are the same one."""
        found = np.zeros(self.n_boards, dtype=int)
        for step in range(1, len(self.sets)):
            changed = (self.sets[step] != self.sets[step - 1]).any(-1)
            found[self.owner[changed]] = step
        return found


@torch.no_grad()
def considered(
    m: LoopedModel,
    b: MaskedBatch,
    n_loops: int | None = None,
    threshold: float | None = None,
    batch_size: int = 64,
) -> Considered:
    """Read-outs of the hidden cells of `b` after each loop (default: to S_max), of boards with one solution.

    UsageError where no board has exactly one, or `threshold` is not in 0..1 / size.
    """
    board = board_of(b)
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    threshold = 1 / (2 * board.size) if threshold is None else threshold
    check_number("threshold", threshold, 0, 1 / board.size)
    if m.cfg.d_vocab <= board.size or m.cfg.mask_token_id != board.size:
        raise UsageError(f"[MASK] of a {board.name} model is {board.size}, this one's is {m.cfg.mask_token_id}")
    single = unique(board, b.tokens) & b.masked.any(-1).cpu()
    if not bool(single.any()):
        raise UsageError("no puzzle has exactly one solution; make them with puzzles(..., unique=True)")
    b = b.rows(single.to(b.tokens.device))
    parts = []
    for _, part in b.batches(batch_size):
        read = [m.readout(*at, rows=part.masked) for at in m.states(part.tokens, n_loops, part.attention_mask)]
        parts.append(torch.stack([logits[:, : board.size].double().cpu().log_softmax(-1) for logits in read]))
    return Considered(board, b, torch.cat(parts, 1), threshold)


def allowed(found: Considered, rule: str, shuffled: bool = False) -> Allowed:
    """What propagation by `rule` (of `RULES`) allows in the same cells after 0, 1, .. rounds, as far as it goes.

    `shuffled`: on the next board's grid with the same cells hidden, what no relation to the own symbols gives.
    UsageError for a rule that is none, or where there is no other board.
    """
    if rule not in RULES:
        raise UsageError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    tokens = found.batch.tokens.cpu()
    if shuffled:
        if len(tokens) < 2:
            raise UsageError("shuffled sets come from another board; give two puzzles at least")
        tokens = torch.where(found.hidden, tokens, found.batch.clean.cpu().roll(1, 0))
    hidden_singles = RULES[rule]
    n_rounds = max(1, int(propagate(found.board, tokens, hidden_singles).depth.max()))
    sets = candidates_by_round(found.board, tokens, n_rounds, hidden_singles)[:, found.hidden]
    return Allowed(sets.numpy(), found.owner, len(tokens))


def only(found: Considered, number: int) -> Considered:
    """The board `number` alone."""
    mine = torch.from_numpy(found.owner == number)
    return replace(found, batch=found.batch.rows(slice(number, number + 1)), log_p=found.log_p[:, mine])
