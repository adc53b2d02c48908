"""Where an intervention acts: loops, layers and heads, checked, as filters on sites."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.layout import Layout
from loopmdm.model.sites import Filter, at

Loops = int | slice | Iterable[int] | None
Chosen = int | Sequence[int] | None


def applications(cfg: Layout, loops: Loops, layers: Chosen, leaf: str) -> Filter:
    """A leaf of chosen layers: of looped ones in the chosen loops (None: every), of others in their one run.

    `layers` None means the looped ones.
    """
    chosen = several("layer", layers, cfg.n_layers)
    where = at(layer=cfg.layers("loop") if chosen is None else chosen, leaf=leaf)
    return where & (in_loops(loops) | at(loop=None))


def in_loops(loops: Loops, leaf: str | None = None) -> Filter:
    """Sites of the chosen loops (None: every loop), or one leaf of them."""
    chosen = slice(0, None) if loops is None else loops
    return at(loop=chosen) if leaf is None else at(loop=chosen, layer=None, leaf=leaf)


def in_heads(edges: Tensor, heads: list[int] | None, n_heads: int) -> Tensor:
    """Edges [batch, head or 1, query, key] of the chosen heads only; None: of all."""
    if heads is None:
        return edges
    only = torch.zeros(n_heads, dtype=torch.bool, device=edges.device)
    only[heads] = True
    return edges & only[:, None, None]


def several(what: str, chosen: Chosen, size: int) -> list[int] | None:
    """A number or several, each in 0..size - 1; None stays None."""
    if chosen is None:
        return None
    listed = list(chosen) if isinstance(chosen, Iterable) else [chosen]
    if not listed:
        raise UsageError(f"no {what} is named; name at least one of 0..{size - 1}, or None for all")
    for number in listed:
        if check_count(what, number, least=0) >= size:
            raise UsageError(f"{what} must be 0..{size - 1}, got {number}")
    return [int(number) for number in listed]
