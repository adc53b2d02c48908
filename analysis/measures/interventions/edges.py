"""Which edges of attention to act on: between groups of positions, or random ones of equal mass and distance."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.watch.groups import TOKEN_GROUPS, members
from loopmdm.model.context import Context
from loopmdm.model.errors import unknown_name
from loopmdm.model.randomness import row_uniforms

ENDS = (*TOKEN_GROUPS, "any")
EDGES = ("none", *(f"{query}->{key}" for query in ENDS for key in ENDS))


def check_edges(what: object) -> None:
    """UsageError with near matches unless `what` names a set of edges."""
    if not isinstance(what, str) or what not in EDGES:
        raise unknown_name("set of edges", what, EDGES)


def edges(context: Context, name: str) -> Bool[Tensor, "batch query key"]:
    """Edges from real queries to *other* real keys of the named groups; "none" has none.

    "masked->masked" leaves relays open, as a clean query may hand on what it reads at masked keys;
    "any->masked" hides masked keys from all queries.
    """
    n = context.tokens.shape[1]
    if name == "none":
        return torch.zeros(len(context.tokens), n, n, dtype=torch.bool, device=context.tokens.device)
    found = members(context.masked, context.real)
    queries, keys = (found[group] for group in name.split("->"))
    own = torch.eye(n, dtype=torch.bool, device=context.tokens.device)
    return queries[:, :, None] & keys[:, None, :] & ~own


def matched_edges(
    pattern: Float[Tensor, "batch head query key"], context: Context, name: str, seed: int, step: int
) -> Bool[Tensor, "batch head query key"]:
    """Random edges of the same queries that carry the mass of the named ones at the same distances.

    Distances |query - key| are binned by powers of two; in each bin random other keys are taken, whatever their
    group, until their mass comes nearest to that of the named edges there. What is taken depends on `seed`, the
    sequence's place in the batch and `step`.
    """
    batch, _, n, _ = pattern.shape
    device = pattern.device
    named = edges(context, name)
    position = torch.arange(n, device=device)
    distance = (position[:, None] - position[None, :]).abs()
    bins = distance.clamp(min=1).log2().floor().long()  # [query, key]
    others = context.real[:, None, :] & (distance > 0) & named.any(-1, keepdim=True)
    mass = pattern * named[:, None]
    target = torch.zeros(*pattern.shape[:3], int(bins.max()) + 1, device=device, dtype=pattern.dtype)
    target.scatter_add_(-1, bins.expand_as(pattern), mass)
    noise = row_uniforms(seed, "edges", batch, n * n, step=step).view(batch, n, n).to(device)
    order = (bins + 0.999 * noise).argsort(-1)  # by bin, random inside
    ordered_bins = bins.expand(batch, n, n).gather(-1, order)
    carried = (pattern * others[:, None]).gather(-1, order[:, None].expand_as(pattern))
    before = carried.cumsum(-1) - carried
    first = torch.ones_like(ordered_bins, dtype=torch.bool)
    first[..., 1:] = ordered_bins[..., 1:] != ordered_bins[..., :-1]
    start = torch.where(first[:, None], before, 0.0).cummax(-1).values
    wanted = target.gather(-1, ordered_bins[:, None].expand_as(pattern))
    taken = (before - start + carried / 2 <= wanted) & (carried > 0)
    return torch.zeros_like(taken).scatter_(-1, order[:, None].expand_as(taken), taken)
