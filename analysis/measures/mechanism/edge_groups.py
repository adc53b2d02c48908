"""Edges by who tells whom: the relation of the two positions, and whether key and query are masked or clean.

    on a board    self, box (same box), row and column (of another box), none
    elsewhere     self, and the distance |query - key| by powers of two: 1, 2-3, 4-7, ..

Crossed with the group of the key and of the query they part all edges between real positions (of a causal model
those that exist), so that sums over groups are sums over edges.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from loopmdm.analysis.measures.relations import relations
from loopmdm.analysis.watch.groups import members
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import By, asked
from loopmdm.model.sequences import MaskedBatch


@dataclass(frozen=True)
class EdgeGroup:
    """Edges of a `relation` from keys to queries that are "masked" or "clean"."""

    relation: str
    keys: str
    queries: str


def edge_groups(
    m: HookedLoopMDM, b: MaskedBatch, by: By = "holds"
) -> dict[EdgeGroup, Bool[Tensor, "batch query key"]]:
    """All groups of edges of a batch that has any; queries are grouped by what they hold or predict."""
    width = b.tokens.shape[1]
    hidden = m.cfg.hidden(b.tokens)
    keys, queries = members(hidden, b.real), members(*asked(hidden, b.real, by))
    there = torch.ones(width, width, dtype=torch.bool, device=b.tokens.device)
    there = there.tril() if m.facts.causal else there
    found = {}
    for relation, pairs in relations(m, width).items():
        for key in ("masked", "clean"):
            for query in ("masked", "clean"):
                edges = queries[query][:, :, None] & keys[key][:, None, :] & (pairs & there)
                if bool(edges.any()):
                    found[EdgeGroup(relation, key, query)] = edges
    return found
