"""A model whose mechanism is known: its weights are set by hand so that a loop is a round of naked singles.

What a method says of it can be checked: which head carries what to which cell in which loop is known exactly.

    stream      row, column and box of a cell; its symbol, if known; whether it is open; per symbol how often its
                units hold it (`taken`); which symbols are left (`candidates`); a constant that keeps norms still
    layer 0     heads "row", "column" and "box" average a unit's known symbols, head "renew" takes the old counts
                away; the MLP writes candidates: symbols of an open cell that no unit holds
    layer 1     no attention; the MLP fills open cells that have one candidate left

Both layers loop, nothing stands before or after, and the logits are 10 x known + 3 x candidates: after loop i the
model answers the candidates that i rounds of filling leave, and cells that round i + 1 fills are known.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.model.context import Context
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.tasks.sudoku import BOARDS, Board

Head = Literal["row", "column", "box", "renew"]
HEADS: tuple[Head, ...] = get_args(Head)
"""The heads of layer 0, in order."""
UNITS = HEADS[:3]
KNOWN_LOGIT, CANDIDATE_LOGIT = 10.0, 3.0
CONSTANT = 1e4
"""So much larger than all else that a norm's scale is the same at every position, to 1e-7."""
SHARP = 32.0
"""2 (GELU(SHARP (x - 1/4)) - GELU(SHARP (x - 3/4))) / SHARP is a step from 0 at x <= 0 to 1 at x >= 1, to 1e-14 at
integers and flat beside them, so that rounding does not grow over loops."""
FOCUS = 200.0
"""Lead of a head's chosen keys in scores: the others get exp(-FOCUS) = 0."""


class NakedSingles(LoopMDM):
    """`naked_singles` without hooks; `positions` [cell, d_model] is added to the embedding."""

    positions: Tensor

    def __init__(self, board: Board = BOARDS["sudoku6"], max_loops: int = 12):
        size, self.board = board.size, board
        widths = {"row": size, "column": size, "box": size, "known": size, "open": 1, "taken": size,
                  "candidates": size, "constant": 1}  # fmt: skip
        ends = torch.tensor(list(widths.values())).cumsum(0).tolist()
        self.channels = {
            name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)
        }
        super().__init__(
            LoopMDMConfig(
                d_vocab=size + 1, n_ctx=board.n_cells, d_model=ends[-1], n_heads=len(HEADS), d_head=2 * size + 2,
                d_mlp=3 * size, n_prelude_layers=0, n_loop_layers=2, n_coda_layers=0, max_loops=max_loops,
                normalization_type="RMS", act_fn="gelu", mlp_bias=False, unembed_bias=False,
                rotary_base=1e300,  # all pairs of dimensions but the first stand still
            )
        )  # fmt: skip
        self.register_buffer("positions", self._positions(), persistent=False)
        self.eval().requires_grad_(False)
        self._plant()

    def enter(self, tokens: Tensor, context: Context) -> Tensor:
        """Symbols and places of cells."""
        return super().enter(tokens, context) + self.positions[: tokens.shape[1]]

    # --- weights ---

    def _positions(self) -> Float[Tensor, "cell d_model"]:
        cell = torch.arange(self.board.n_cells)
        row, column = cell // self.board.size, cell % self.board.size
        box = row // self.board.box_rows * self.board.box_rows + column // self.board.box_columns
        found = torch.zeros(self.board.n_cells, self.cfg.d_model)
        for name, place in (("row", row), ("column", column), ("box", box)):
            found[cell, self.channels[name].start + place] = 1.0
        found[:, self.channels["constant"]] = CONSTANT
        return found

    def _plant(self) -> None:
        of, eye = self.channels, torch.eye(self.board.size)
        for parameter in self.parameters():
            parameter.zero_()
        still = CONSTANT / self.cfg.d_model**0.5  # what every norm divides by
        for name, parameter in self.named_parameters():
            if name.endswith(("ln1.weight", "ln2.weight", "ln_final.weight")):
                parameter.fill_(still)
        self.embed.weight[: self.board.size, of["known"]] = eye
        self.embed.weight[self.board.size, of["open"]] = 1.0
        for number, head in enumerate(HEADS):
            self._plant_head(number, head)
        self._plant_candidates()
        self._plant_filling()
        self.unembed.weight[:-1, of["known"]] = KNOWN_LOGIT * eye
        self.unembed.weight[:-1, of["candidates"]] = CANDIDATE_LOGIT * eye

    def _plant_head(self, number: int, head: Head) -> None:
        """Attend to the cells of one unit, or to the cell itself, which alone shares its row and its column."""
        attention, size, of = self.block(0).attn, self.board.size, self.channels
        width, half = self.cfg.d_head, self.cfg.d_head // 2
        still = [dim for dim in range(width) if dim % half]  # of a pair that does not turn
        q, k, v = attention.qkv.weight.view(3, len(HEADS), width, -1)[:, number]
        matched = [head] if head in UNITS else ["row", "column"]
        focus = (FOCUS * width**0.5) ** 0.5
        for place, name in enumerate(matched):
            dims = still[place * size : (place + 1) * size]
            for matrix in (q, k):
                matrix[dims, of[name]] = focus * torch.eye(size)
        source, gain = ("known", float(size)) if head in UNITS else ("taken", -1.0)
        v[:size, of[source]] = torch.eye(size)
        out = attention.out.weight.view(-1, len(HEADS), width)[:, number]
        out[of["taken"], :size] = gain * torch.eye(size)

    def _plant_candidates(self) -> None:
        """Where a cell is open: symbols that no unit holds, in place of those of the loop before."""
        size, of = self.board.size, self.channels
        seen = torch.zeros(size, self.cfg.d_model)
        seen[:, of["taken"]] = -torch.eye(size)
        seen[:, of["open"]] = 1.0
        self._plant_steps(0, seen, {"candidates": 1.0})
        up, out = self.block(0).mlp.up.weight, self.block(0).mlp.out.weight
        up[2 * size :, of["candidates"]] = SHARP * torch.eye(size)
        out[of["candidates"], 2 * size :] = -torch.eye(size) / SHARP

    def _plant_filling(self) -> None:
        """A cell with one candidate is known and no longer open."""
        size, of = self.board.size, self.channels
        single = torch.zeros(size, self.cfg.d_model)
        single[:, of["candidates"]] = 2 * torch.eye(size) - 1
        self._plant_steps(1, single, {"known": 1.0, "open": -1.0})

    def _plant_steps(self, layer: int, read: Float[Tensor, "symbol d_model"], writes: dict[str, float]) -> None:
        """Write, per symbol, whether what is `read` is 1 or more, not 0 or less; "open" gets their sum."""
        mlp, size, constant = self.block(layer).mlp, self.board.size, self.channels["constant"]
        for half, (threshold, sign) in enumerate(((0.25, 1.0), (0.75, -1.0))):
            rows = slice(half * size, (half + 1) * size)
            mlp.up.weight[rows] = SHARP * read
            mlp.up.weight[rows, constant] = -SHARP * threshold / CONSTANT
            for name, gain in writes.items():
                target = self.channels[name]
                chosen = torch.eye(size) if name != "open" else torch.ones(1, size)
                mlp.out.weight[target, rows] = 2 * sign * gain * chosen / SHARP


def naked_singles(board: str | Board = "sudoku6", max_loops: int = 12) -> HookedLoopMDM:
    """A model made by hand that does a round of naked singles a loop; `m.model.channels` names its stream."""
    m = HookedLoopMDM(NakedSingles(BOARDS[board] if isinstance(board, str) else board, max_loops))
    m.model_name = "naked-singles"
    return m
