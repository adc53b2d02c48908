"""Who tells whom, in which loop: what edges carry, by relation, group and loop; and what relays hand on.

Attention mass says where a query looks, not what it is told: here edges carry another run's messages (`edges`),
and what the answer loses is what they carried. Per loop and group of edges:

    method  exact          all edges of the group at once, patched in that loop alone; later loops run on
            attribution    the sum of first-order effects of its edges, `difference` only
    per_edge               the effect over the mean number of edges of the group a sequence

`relay_effects` follows two hops: what changed -> relay in loop i -> masked receiver in loop j, all else clean, by
the relation of the second hop. A relay is "masked" (a masked cell hands on what it heard) or "clean".
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.contrast import questions
from loopmdm.analysis.measures.mechanism.corruption import Corruption, corrupted
from loopmdm.analysis.measures.mechanism.edge_attribution import edge_attribution
from loopmdm.analysis.measures.mechanism.edge_groups import edge_groups
from loopmdm.analysis.measures.mechanism.edge_paths import Hop, hear, hold
from loopmdm.analysis.measures.mechanism.edges import METRICS, EdgeStudy
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.measures.relations import SELF, relations
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.groups import TOKEN_GROUPS
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.layout import By, check_by
from loopmdm.model.sequences import MaskedBatch

Place = tuple[Any, ...]
METHODS = ("exact", "attribution", "attribution, all")


class _Table:
    """Effects [sequence] by row of the frame, filled part by part; NaN where a sequence has no such edge."""

    def __init__(self, names: tuple[str, ...], n: int, clusters: np.ndarray | None):
        self.names, self.n, self.clusters = names, n, clusters
        self.values: dict[Place, np.ndarray] = {}
        self.edges: dict[Place, np.ndarray] = {}

    def put(self, place: Place, span: slice | np.ndarray, values: Tensor, edges: Tensor) -> None:
        """`values` and numbers of `edges` [sequence] of a part."""
        for store, found in ((self.values, values.masked_fill(edges == 0, torch.nan)), (self.edges, edges)):
            store.setdefault(place, np.full(self.n, np.nan))[span] = found.double().cpu().numpy()

    def frame(self, order: list[str]) -> pd.DataFrame:
        """A row for each place, words in `order`: value, standard_error, per_edge, per_edge_se, n_edges, n."""
        rows = []
        rank = {word: number for number, word in enumerate(order)}
        for place in sorted(self.values, key=lambda place: [rank.get(part, part) for part in place]):
            values = self.values[place]
            edges = np.where(np.isfinite(values), self.edges[place], np.nan)
            mean, error, n = stats.mean_and_error(values, self.clusters)
            number = float(edges[np.isfinite(edges)].mean()) if n else float("nan")
            told = {"value": float(mean), "standard_error": float(error)}
            told |= {"per_edge": float(mean) / number, "per_edge_se": float(error) / number}
            rows.append(dict(zip(self.names, place, strict=True)) | told | {"n_edges": number, "n": int(n)})
        return pd.DataFrame(rows)


def edge_effects(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    *,
    corruption: Corruption = "token",
    by: By = "holds",
    n_exact: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """What edges carry, by loop, relation and group; exact for `n_exact` sequences, evenly spread (None: all).

    Columns: n_loops method loop relation keys queries metric value standard_error per_edge per_edge_se n_edges n.
    Nats a sequence (mean over its asked positions); a row counts the sequences that have such edges. "attribution"
    has the sequences of "exact", "attribution, all" all of them.
    """
    check_by(m.facts, by, "edge_effects")
    n_loops, other = check_loops(m, n_loops), _other("edge_effects", m, b, corruption, seed)
    most = len(b) if n_exact is None else check_count("n_exact", n_exact)
    names = ("n_loops", "method", "loop", "relation", "keys", "queries", "metric")
    table = _Table(names, len(b), b.clusters)
    for start, part in b.batches(batch_size):
        span = slice(start, start + len(part))
        _to_first_order(table, EdgeStudy.of(m, part, other[span], n_loops), by, span, "attribution, all")
    keep = torch.linspace(0, len(b) - 1, min(most, len(b))).long()
    for start, part in b.rows(keep).batches(batch_size):
        span = keep[start : start + len(part)].numpy()
        study = EdgeStudy.of(m, part, other[span], n_loops)
        _to_first_order(table, study, by, span, "attribution")
        _exactly(table, study, by, span)
    return table.frame([*METHODS, *relations(m, b.tokens.shape[1]), "any", *TOKEN_GROUPS, *METRICS])


def _to_first_order(table: _Table, study: EdgeStudy, by: By, span: slice | np.ndarray, method: str) -> None:
    groups = edge_groups(study.m, study.batch, by)
    for loop, carried in edge_attribution(study):
        each = carried.sum(1)
        for group, edges in groups.items():
            place = (study.n_loops, method, loop, group.relation, group.keys, group.queries, "difference")
            table.put(place, span, (each * edges).flatten(1).sum(-1), edges.flatten(1).sum(-1))


def _exactly(table: _Table, study: EdgeStudy, by: By, span: slice | np.ndarray) -> None:
    groups = edge_groups(study.m, study.batch, by)
    for loop in range(study.n_loops):
        for group, edges in groups.items():
            lost = study.by_sequence(study.lost(study.patched(edges, [loop])))
            for metric in METRICS:
                place = (study.n_loops, "exact", loop, group.relation, group.keys, group.queries, metric)
                table.put(place, span, lost[metric], edges.flatten(1).sum(-1))


def _other(
    name: str, m: HookedLoopMDM, b: MaskedBatch, corruption: Corruption, seed: int
) -> Int[Tensor, "batch pos"]:
    """The corrupted tokens; UsageError for a sequence in which nothing can be changed."""
    questions(name, m, b)
    other = corrupted(m, b, seed, corruption).tokens
    same = (other == b.tokens).all(-1)
    if bool(same.any()):
        number = int(same.nonzero()[0, 0])
        raise UsageError(
            f"{name}: sequence {number} shows no token that could be changed; mask less, or leave it out"
        )
    return other


def relay_effects(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    *,
    corruption: Corruption = "token",
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """What relays hand on: what changed -> relay in loop `loop` -> masked receiver in `second`, by its relation.

    Columns: n_loops loop second relay relation metric value standard_error per_edge per_edge_se n_edges n, as in
    `edge_effects`; edges are those of the second hop. Relation "any" is all of them at once.
    """
    m.facts.need("masks", "bidirectional", by="relay_effects")
    if check_loops(m, n_loops) < 2:
        raise UsageError("a relay needs two loops; give n_loops of at least 2")
    n_loops, other = check_loops(m, n_loops), _other("relay_effects", m, b, corruption, seed)
    names = ("n_loops", "loop", "second", "relay", "relation", "metric")
    table = _Table(names, len(b), b.clusters)
    for start, part in b.batches(batch_size):
        span = slice(start, start + len(part))
        study = EdgeStudy.of(m, part, other[span], n_loops)
        for place, second, lost in _relayed(study, study.batch.tokens != other[span]):
            for metric in METRICS:
                table.put((n_loops, *place, metric), span, lost[metric], second.flatten(1).sum(-1))
    return table.frame([*METHODS, *relations(m, b.tokens.shape[1]), "any", *TOKEN_GROUPS, *METRICS])


def _relayed(
    study: EdgeStudy, sources: Bool[Tensor, "batch pos"]
) -> Iterator[tuple[Place, Tensor, dict[str, Float[Tensor, " batch"]]]]:
    """(loop, second loop, relay, relation), the second hop's edges, and what was lost."""
    groups = edge_groups(study.m, study.batch)
    for relay in ("masked", "clean"):
        onward = {g.relation: e for g, e in groups.items() if (g.keys, g.queries) == (relay, "masked")}
        onward = {name: edges for name, edges in onward.items() if name != SELF}
        if not onward:
            continue
        onward["any"] = torch.stack(list(onward.values())).any(0)
        hears = _members(study, relay) & ~sources
        first = hears[:, :, None] & sources[:, None, :]
        for loop in range(study.n_loops - 1):
            state = hear(study, Hop(loop, first), study.corrupt.messages)
            for second in range(loop + 1, study.n_loops):
                source = hold(study, state, loop + 1, second)
                for relation, edges in onward.items():
                    then = edges & hears[:, None, :]
                    received = hear(study, Hop(second, then), source)
                    lost = study.lost(study.onward(received, second + 1))
                    yield (loop, second, relay, relation), then, study.by_sequence(lost)


def _members(study: EdgeStudy, group: str) -> Bool[Tensor, "batch pos"]:
    hidden = study.m.cfg.hidden(study.batch.tokens)
    return (hidden if group == "masked" else ~hidden) & study.batch.real


# --- does the relation say anything? ---


@torch.no_grad()
def edge_strength(
    m: HookedLoopMDM, b: MaskedBatch, corrupt: Int[Tensor, "batch pos"], n_loops: int | None = None
) -> Float[Tensor, "query key"]:
    """Mean size of each edge's attribution, over sequences and summed over loops: what `relation_test` takes."""
    total = None
    for loop, carried in edge_attribution(EdgeStudy.of(m, b, corrupt, n_loops)):  # noqa: B007
        size = carried.sum(1).abs().mean(0)
        total = size if total is None else total + size
    assert total is not None
    return total


def relation_test(
    strength: Float[Tensor, "query key"],
    related: dict[str, Bool[Tensor, "query key"]],
    n_draws: int = 999,
    seed: int = 0,
) -> tuple[float, float]:
    """Share of the variance of edges' strength that their relation explains, and its p-value.

    The null: places renamed at random, the same in queries and keys, which keeps sizes of relations and what each
    place says and hears; p = (1 + draws that explain as much) / (1 + n_draws). Edges to oneself are left out.
    """
    n = len(strength)
    apart = ~torch.eye(n, dtype=torch.bool)
    kind = sum(number * pairs.cpu().long() for number, pairs in enumerate(related.values(), start=1))
    if not isinstance(kind, Tensor) or not bool((kind[apart] > 0).all()):
        raise UsageError("relations must part all pairs of positions; see relations")
    check_count("n_draws", n_draws)
    values, generator = strength.cpu().double(), torch.Generator().manual_seed(seed)
    orders = [torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(n_draws))]
    found = [_explained(values[apart], kind[order][:, order][apart], len(related)) for order in orders]
    p = (1 + sum(share >= found[0] for share in found[1:])) / (1 + n_draws)
    return found[0], p


def _explained(values: Tensor, kind: Tensor, n_kinds: int) -> float:
    number = torch.bincount(kind, minlength=n_kinds + 1)
    means = torch.bincount(kind, values, n_kinds + 1) / number.clamp(min=1)
    spread = float((values - values.mean()).square().sum())
    return float((number * (means - values.mean()).square())[number > 0].sum()) / spread if spread else 0.0


# --- measures ---


def _effects_of(
    case: Case,
    corruption: str = "token",
    mask_ratio: float = 0.5,
    n_exact: int = 16,
    by: str = "holds",
) -> pd.DataFrame:
    """By loop, relation (distance on text) and group: exact for `n_exact` sequences, to first order for all."""
    return _on(case, case.masked(mask_ratio), corruption, n_exact, by)


def _on(case: Case, b: MaskedBatch, corruption: str = "token", n_exact: int = 16, by: str = "holds", **_: Any):
    given: dict[str, Any] = {"corruption": corruption, "n_exact": n_exact, "by": by}
    return edge_effects(case.m, b, case.n_loops, seed=case.seed, **given)


def _relays_of(
    case: Case, corruption: str = "token", mask_ratio: float = 0.5, n_sequences: int = 16
) -> pd.DataFrame:
    """By pair of loops, relay and relation of the second hop, on `n_sequences` of the test sequences."""
    b = case.masked(mask_ratio)
    keep = torch.linspace(0, len(b) - 1, min(n_sequences, len(b))).long()
    given: dict[str, Any] = {"corruption": corruption}
    return relay_effects(case.m, b.rows(keep), case.n_loops, seed=case.seed, **given)


WHAT = "who tells whom, in which loop: what edges carry"
MEASURES = (
    Measure("edge-effects", WHAT, _effects_of, "test set", groupless=_on),
    Measure("relay-effects", "what relays hand on: two hops over loops", _relays_of, "test set", loops=2),
)
