"""What a key is to a query: relations that part all pairs, of cells on a board or of positions in text.

    board   self | box | row | column (these two of another box) | none
    text    self | previous | next | same (shows the token that is asked for at the query) | near | far

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

BOARD = ("self", *RELATIONS)
TEXT = ("self", "previous", "next", "same", "near", "far")
NEAR = 8


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
