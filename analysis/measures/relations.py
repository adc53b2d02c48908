"""What two positions are to each other: relations that part all pairs of cells or of positions in text.

    board                self | box | row | column (these two of another box) | none
    text, by distance    self | |query - key| by powers of two: 1, 2-3, 4-7, ..   (`relations`, `Places`)
    text, by content     self | previous | next | same (shows what is asked for at the query) | near | far
                         (`Relations`)

The first that holds counts, so that shares of attention sum to 1 over relations. Near is up to 8 positions away.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.measures.interventions.selections import RELATIONS, relation_of
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.sudoku import board_of_model

SELF = "self"
BOARD = (SELF, *RELATIONS)
TEXT = (SELF, "previous", "next", "same", "near", "far")
NEAR = 8


def relations(m: HookedLoopMDM, width: int) -> dict[str, Bool[Tensor, "query key"]]:
    """Which pairs of `width` positions are in each relation; they part all pairs."""
    own = torch.eye(width, dtype=torch.bool, device=m.model.device)
    board = board_of_model(m.cfg)
    if board is not None and board.n_cells == width:
        return {SELF: own} | {name: relation_of(board, name).to(own.device) for name in RELATIONS}
    place = torch.arange(width, device=own.device)
    distance = (place[:, None] - place[None]).abs()
    found, low = {SELF: own}, 1
    while low < width:
        last = min(2 * low, width) - 1
        found[str(low) if last == low else f"{low}-{last}"] = (distance >= low) & (distance <= last)
        low *= 2
    return found


@dataclass(frozen=True)
class Places:
    """Classes of distance, by `distance` and `relation`; `member` [class, source, receiver] part all pairs.

    On a board cells of one row, column or box are at distance 1, all others at 2: any two cells share a peer. In
    causal models earlier receivers are in no class: nothing can reach them.
    """

    distance: tuple[str, ...]
    relation: tuple[str, ...]
    member: Bool[Tensor, "kind pos pos"]

    @classmethod
    def of(cls, m: HookedLoopMDM, n: int) -> "Places":
        """Of the board that `m` fills, or of `n` positions of text."""
        found = relations(m, n)
        member = torch.stack(list(found.values()))
        if tuple(found) == BOARD:
            return cls(("0", "1", "1", "1", "2"), BOARD, member)
        member = member & torch.ones_like(member[0]).triu() if m.facts.causal else member
        return cls(("0", *list(found)[1:]), (SELF, *["any"] * (len(found) - 1)), member)


@dataclass(frozen=True)
class Relations:
    """`member` [batch, relation, query, key] parts the keys that a query can see; `names` of the relations."""

    names: tuple[str, ...]
    member: Bool[Tensor, "batch relation query key"]

    @classmethod
    def of(cls, m: HookedLoopMDM, b: MaskedBatch) -> "Relations":
        """Of a batch as it is asked (`contrast.questions`): `clean` holds what is asked for at masked queries."""
        n, device = b.tokens.shape[1], b.tokens.device
        board = board_of_model(m.cfg)
        own = torch.eye(n, dtype=torch.bool, device=device)
        if board is not None:
            found = torch.stack([own, *(relation_of(board, name).to(device) for name in RELATIONS)])[None]
            names = BOARD
        else:
            found, names = _text(m, b, own), TEXT
        seen = b.real[:, None, None, :] & b.real[:, None, :, None]
        seen = seen & torch.ones_like(own).tril() if m.facts.causal else seen
        return cls(names, found & seen)

    def shares(self, asked: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch relation"]:
        """What each relation gets of even attention, mean over the `asked` queries; NaN without any."""
        counts = self.member.sum(-1).float()
        even = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return (even * asked[:, None]).sum(-1) / asked.sum(-1, keepdim=True)

    def masses(
        self, pattern: Float[Tensor, "batch head query key"], asked: Bool[Tensor, "batch query"]
    ) -> Float[Tensor, "batch head relation"]:
        """What each relation gets of a pattern, mean over the `asked` queries; NaN without any."""
        weights = (asked / asked.sum(-1, keepdim=True)).to(pattern)
        return torch.einsum("bq,bhqk,brqk->bhr", weights, pattern, self.member.to(pattern))


def _text(m: HookedLoopMDM, b: MaskedBatch, own: Tensor) -> Bool[Tensor, "batch relation query key"]:
    at = torch.arange(len(own), device=own.device)
    apart = at[None] - at[:, None]  # key less query
    shown = ~m.cfg.hidden(b.tokens)
    same = (b.tokens[:, None, :] == b.clean[:, :, None]) & shown[:, None, :] & b.masked[:, :, None]
    rest = torch.ones_like(same)
    rules = [own, apart == -1, apart == 1, same, apart.abs() <= NEAR, torch.ones_like(own)]
    found = []
    for rule in rules:
        found.append(rest & rule)
        rest = rest & ~rule
    return torch.stack(found, 1)
