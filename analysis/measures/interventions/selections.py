"""Choices of edges: named groups narrowed by a relation on a board or at random, or two sides of equal mass.

The control of an edge group is its complement: other edges of the same queries. Their masses differ, so both sides
are drawn: for every query and head random edges "within" the group and random ones "outside", each up to the mass
that the poorer side has. The last edge is taken with the probability that makes the mass right on average.

Pairs of cells are parted by where they meet first: "box" (same box, whatever row or column), "row" and "column"
(of another box), "none". On 6x6 that is 5, 3, 4 and 23 other cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.measures.interventions.edges import check_edges, edges
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_number, unknown_name
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.tasks.sudoku import Board, board_of_model

Choose = Callable[[Tensor, Context], Tensor]
"""From a pattern [batch, head, query, key] and what is running to edges [batch, head or 1, query, key]."""
RELATIONS = ("box", "row", "column", "none")
SIDES = ("all", "within", "outside")


@dataclass(frozen=True)
class EdgeSet:
    """Edges of `groups` (as `cut` names them), of one `relation` on a board ("any": all), or a random `share`.

    `side` "within" and "outside": random edges of these, and of all others of the same queries, of equal mass.
    """

    groups: str = "masked->masked"
    relation: str = "any"
    share: float = 1.0
    side: str = "all"

    def __post_init__(self):
        """Known names; a share in (0, 1]."""
        check_edges(self.groups)
        for what, name, known in (("relation", self.relation, ("any", *RELATIONS)), ("side", self.side, SIDES)):
            if not isinstance(name, str) or name not in known:
                raise unknown_name(what, name, known)
        check_number("share", self.share, 0, 1, above=True)


@dataclass(frozen=True)
class Draw:
    """The `number` of a draw under `seed`; sequence i of a batch is number `first_index` + i of its set."""

    seed: int = 0
    number: int = 0
    first_index: int = 0


def choice(m: HookedLoopMDM, wanted: EdgeSet, draw: Draw | None = None) -> Choose:
    """How `cut` and `replace_values` find these edges; one random order of edges holds for all loops and heads."""
    related = None if wanted.relation == "any" else relation_of(_board(m), wanted.relation)
    drawn = draw or Draw()

    def choose(pattern: Tensor, context: Context) -> Tensor:
        full = edges(context, wanted.groups)
        full = full if related is None else full & related.to(full.device)
        if wanted.share == 1 and wanted.side == "all":
            return full[:, None]
        order = priority(drawn, *full.shape[:2]).to(full.device)
        named = full & (order < wanted.share)
        if wanted.side == "all":
            return named[:, None]
        own = torch.eye(full.shape[-1], dtype=torch.bool, device=full.device)
        others = context.real[:, None, :] & ~full & ~own & named.any(-1, keepdim=True)
        sides = (named, others) if wanted.side == "within" else (others, named)
        return equal_mass(pattern, *sides, order)

    choose.looks = wanted.side != "all"  # pyright: ignore[reportFunctionMemberAccess]
    return choose


def as_choice(m: HookedLoopMDM, what: "str | Choose") -> Choose:
    """A choice, or the one of all edges of a name; UsageError for what is neither."""
    return what if callable(what) else choice(m, EdgeSet(what))


def looks(choose: Choose) -> bool:
    """Whether a choice looks at the pattern; one of somebody else's does."""
    return getattr(choose, "looks", True)


def equal_mass(
    pattern: Float[Tensor, "batch head query key"],
    one: Bool[Tensor, "batch query key"],
    other: Bool[Tensor, "batch query key"],
    order: Float[Tensor, "batch query key"],
) -> Bool[Tensor, "batch head query key"]:
    """Edges of `one` in rising `order`, until each query has the mass that the poorer of both sides has.

    The edge that would exceed it is taken with the probability that makes the expected mass equal; the uniform for
    that is the one of the query's edge to itself, which is on no side.
    """
    mass = pattern * one[:, None]
    target = torch.minimum(mass.sum(-1, keepdim=True), (pattern * other[:, None]).sum(-1, keepdim=True))
    sequence = order.argsort(-1)[:, None].expand_as(pattern)
    carried = mass.gather(-1, sequence)
    before = carried.cumsum(-1) - carried
    last = order.diagonal(dim1=-2, dim2=-1)[:, None, :, None]
    taken = (before + last * carried <= target) & (carried > 0)
    return torch.zeros_like(taken).scatter_(-1, sequence, taken)


@lru_cache(maxsize=2)
def priority(draw: Draw, batch: int, n: int) -> Float[Tensor, "batch query key"]:
    """A uniform for every edge of every sequence."""
    drawn = row_uniforms(draw.seed, "edges", batch, n * n, draw.first_index, draw.number)
    return drawn.view(batch, n, n)


def relation_of(board: Board, name: str) -> Bool[Tensor, "cell cell"]:
    """Which pairs of cells are in a relation of `RELATIONS`; these part all pairs of different cells."""
    cell = torch.arange(board.n_cells)
    row, column = cell // board.size, cell % board.size
    box = row // board.box_rows * board.size + column // board.box_columns
    same = {key: of[:, None] == of[None] for key, of in (("box", box), ("row", row), ("column", column))}
    outside = ~same["box"]
    found = {key: same[key] & outside for key in ("row", "column")}
    found |= {"box": same["box"], "none": outside & ~same["row"] & ~same["column"]}
    return found[name] & ~torch.eye(board.n_cells, dtype=torch.bool)


def _board(m: HookedLoopMDM) -> Board:
    board = board_of_model(m.cfg)
    if board is None:
        raise UsageError(f"relations are those of a Sudoku board; {m.model_name or 'this model'} fills none")
    return board
