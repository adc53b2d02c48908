"""What features mean, where something is known of a position: which variable of the task does a feature follow?

On a Sudoku board: the symbol of a cell, which symbols its clues leave, which its row, column and box hold, and
where it stands. On text, over the most frequent tokens: the true token, the one to the left and to the right. Each
is true or false at a position.

    auc        chance that a feature is larger where a variable is true than where it is not, ties half
    match      the variable of a feature's largest auc on half of the sequences; its auc on the other half counts
    coverage   the F1 of a variable with the feature and threshold that are best on one half, on the other half
               (Karvonen et al. 2024 score dictionaries of board games so)

Place is told apart: a feature that says where a cell stands says nothing of the puzzle.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import step_generator
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.propagation import candidates_by_round, units
from loopmdm.model.tasks.sudoku import Board, board_of_model

PLACE = ("in row", "in column", "in box")
FREQUENT = 24
"""Tokens that text variables are made of."""
FEWEST = 8
"""A variable counts if it is true, and false, at as many rows of each half."""
THRESHOLDS = tuple(step / 10 for step in range(10))
"""Shares of a feature's largest value that are tried."""


@dataclass(frozen=True, eq=False)
class Variables:
    """`values` [row, variable]; `names` and `kinds` of each; `sample` [row], which sequence; `position` [row]."""

    values: Bool[Tensor, "row variable"]
    names: list[str]
    kinds: list[str]
    sample: np.ndarray
    position: np.ndarray

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Rows of even and of odd sequences."""
        odd = torch.from_numpy(self.sample % 2 == 1)
        return (~odd).nonzero()[:, 0], odd.nonzero()[:, 0]

    @property
    def content(self) -> np.ndarray:
        """Which variables say more than place."""
        return np.array([kind not in PLACE for kind in self.kinds])

    def shuffled(self, seed: int = 0) -> "Variables":
        """Each row with the variables of another row at the same position: what chance and place give."""
        order = np.arange(len(self.sample))
        draw = step_generator(seed, "donors")
        for at in np.unique(self.position):
            here = np.flatnonzero(self.position == at)
            order[here] = here[draw.permutation(len(here))]
        return replace(self, values=self.values[torch.from_numpy(order)])

    def known(self) -> "Variables":
        """Those that are true and false often enough in both halves; UsageError if none is."""
        counts = [(self.values[half].sum(0), (~self.values[half]).sum(0)) for half in self.halves]
        keep = torch.stack([least >= FEWEST for pair in counts for least in pair]).all(0)
        chosen = keep.nonzero()[:, 0].tolist()
        if not chosen:
            raise UsageError("no variable is true and false often enough to be matched; give more sequences")
        names, kinds = ([of[index] for index in chosen] for of in (self.names, self.kinds))
        return replace(self, values=self.values[:, keep], names=names, kinds=kinds)


def known_variables(m: HookedLoopMDM, b: MaskedBatch, rows: Bool[Tensor, "batch pos"]) -> Variables:
    """What is known at the positions `rows`, in reading order: of a board if the model fills one, else of text."""
    board = board_of_model(m.cfg)
    columns = _of_tokens(m, b) if board is None else _of_board(board, b)
    sample, position = (index.cpu().numpy() for index in rows.nonzero(as_tuple=True))
    names = [(name, kind) for kind, of, _ in columns for name in of]
    values = torch.cat([held[rows.cpu()] for _, _, held in columns], -1)
    return Variables(values, [name for name, _ in names], [kind for _, kind in names], sample, position)


Columns = list[tuple[str, list[str], Tensor]]
"""Kind, names, and values [batch, pos, variable]."""


def _of_board(board: Board, b: MaskedBatch) -> Columns:
    tokens, size = b.tokens.cpu(), board.size
    symbols = torch.arange(size)
    clues = (tokens[..., None] == symbols).float()
    member = units(board)
    held = torch.einsum("uc,bcs->bus", member.float(), clues) > 0
    told = [str(symbol + 1) for symbol in range(size)]
    found: Columns = [
        ("symbol", [f"symbol {v}" for v in told], b.clean.cpu()[..., None] == symbols),
        ("candidate", [f"candidate {v}" for v in told], candidates_by_round(board, tokens, 0)[0]),
    ]
    for number, unit in enumerate(("row", "column", "box")):
        own = member[number * size : (number + 1) * size].float()
        has = torch.einsum("uc,bus->bcs", own, held[:, number * size : (number + 1) * size].float()) > 0
        found.append((f"{unit} has", [f"{unit} has {v}" for v in told], has))
        place = own.T.bool().expand(len(tokens), -1, -1)
        found.append((f"in {unit}", [f"in {unit} {at + 1}" for at in range(size)], place))
    return found


def _of_tokens(m: HookedLoopMDM, b: MaskedBatch) -> Columns:
    """The most frequent true tokens, and which tokens stand to the left and right ([MASK] among them)."""
    tokens, clean, found = b.tokens.cpu(), b.clean.cpu(), []
    outside = torch.full_like(tokens[:, :1], -1)
    sides = {
        "true": clean.masked_fill(b.unknown.cpu(), -1),
        "left": torch.cat([outside, tokens[:, :-1]], 1),
        "right": torch.cat([tokens[:, 1:], outside], 1),
    }
    for kind, of in sides.items():
        ids, counts = of[of >= 0].unique(return_counts=True)
        chosen = ids[counts.argsort(descending=True, stable=True)[:FREQUENT]]
        words = [str(int(token)) for token in chosen]
        words = words if m.tokenizer is None or not len(chosen) else m.to_str_tokens(chosen)
        found.append((kind, [f"{kind} {word!r}" for word in words], of[..., None] == chosen))
    return found


def auc(
    codes: Float[Tensor, "row feature"], values: Bool[Tensor, "row variable"]
) -> Float[np.ndarray, "feature variable"]:
    """P(larger where true) + P(equal) / 2 for each feature and variable; NaN where one side is empty."""
    from scipy.stats import rankdata

    ranks = rankdata(codes.double().cpu().numpy(), axis=0)
    true = values.double().cpu().numpy()
    hits = true.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (ranks.T @ true - hits * (hits + 1) / 2) / (hits * (len(true) - hits))


def matches(codes: Float[Tensor, "row feature"], variables: Variables) -> pd.DataFrame:
    """Each live feature's match: feature variable kind auc_chosen auc (held out).

    A feature is live if it is active on both halves.
    """
    fit, held = variables.halves
    live = ((codes[fit] > 0).any(0) & (codes[held] > 0).any(0)).nonzero()[:, 0]
    chosen, checked = (auc(codes[half][:, live], variables.values[half]) for half in (fit, held))
    best = np.nan_to_num(chosen, nan=-1).argmax(1) if len(live) else np.zeros(0, dtype=int)
    number = np.arange(len(live))
    return pd.DataFrame(
        {
            "feature": live.numpy(),
            "variable": [variables.names[index] for index in best],
            "kind": [variables.kinds[index] for index in best],
            "auc_chosen": chosen[number, best],
            "auc": checked[number, best],
        }
    )


def coverage(codes: Float[Tensor, "row feature"], variables: Variables) -> pd.DataFrame:
    """Each variable's best detector: variable kind feature threshold f1 (held out)."""
    fit, held = variables.halves
    top = codes[fit].amax(0)
    best = torch.full((codes.shape[-1], len(variables.names)), -1.0)
    at = torch.zeros_like(best)
    for share in THRESHOLDS:
        found = _f1(codes[fit] > share * top, variables.values[fit])
        at = torch.where(found > best, torch.full_like(at, share), at)
        best = torch.maximum(found, best)
    feature = best.argmax(0)
    number = torch.arange(len(feature))
    threshold = at[feature, number] * top[feature]
    fires = codes[held][:, feature] > threshold
    true = variables.values[held]
    both = (fires & true).sum(0).double()
    f1 = 2 * both / (fires.sum(0) + true.sum(0)).clamp(min=1)
    return pd.DataFrame(
        {
            "variable": variables.names,
            "kind": variables.kinds,
            "feature": feature.numpy(),
            "threshold": threshold.numpy(),
            "f1": f1.numpy(),
        }
    )


def _f1(fires: Tensor, true: Tensor) -> Tensor:
    """F1 [feature, variable]."""
    both = fires.float().T @ true.float()
    return 2 * both / (fires.sum(0)[:, None] + true.sum(0)).clamp(min=1)
