"""How far apart two positions are: by the units of a board, or by |i - j| in text, in bins.

On a board cells of one row, column or box are at distance 1, all others at 2: any two cells share a peer.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool
from torch import Tensor

from loopmdm.analysis.measures.interventions.selections import RELATIONS, relation_of
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.tasks.sudoku import board_of_model

BINS = (1, 2, 4, 8, 16)
"""Where bins of |i - j| in text end; the last one is open."""


@dataclass(frozen=True)
class Places:
    """Classes of distance, by `distance` and `relation`; `member` [class, source, receiver] parts all pairs.

    In causal models earlier receivers are in no class: nothing can reach them.
    """

    distance: tuple[str, ...]
    relation: tuple[str, ...]
    member: Bool[Tensor, "kind pos pos"]

    @classmethod
    def of(cls, m: HookedLoopMDM, n: int) -> "Places":
        """Of the board that `m` fills, or of `n` positions of text."""
        own, board = torch.eye(n, dtype=torch.bool), board_of_model(m.cfg)
        if board is not None:
            found = torch.stack([own, *(relation_of(board, name) for name in RELATIONS)])
            return cls(("0", "1", "1", "1", "2"), ("self", *RELATIONS), found)
        apart = (torch.arange(n)[:, None] - torch.arange(n)).abs()
        edges = [0, *(end for end in BINS if end < n - 1), n]
        spans = [(low + 1, high) for low, high in pairwise(edges)]
        names = [f"{low}" if low == high else f"{low}-{high}" for low, high in spans]
        names[-1] = f"{spans[-1][0]}+"
        found = torch.stack([own, *((low <= apart) & (apart <= high) for low, high in spans)])
        found = found & torch.ones(n, n, dtype=torch.bool).triu() if m.facts.causal else found
        return cls(("0", *names), ("self", *["any"] * len(names)), found)
