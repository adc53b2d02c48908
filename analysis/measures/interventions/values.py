"""What keys hand on, replaced along some edges: attention keeps its pattern, mass and scale, only content changes.

    z_q = sum_k A_qk v_k   becomes   sum_k A_qk v_k + sum over chosen edges A_qk (w_k - v_k)

Resample ablation takes w from another sequence under the same mask, mean ablation the mean of several such.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.analysis.measures.interventions.edges import check_edges, edges
from loopmdm.analysis.measures.interventions.places import Chosen, Loops, applications, in_heads, several
from loopmdm.analysis.measures.interventions.selections import Choose
from loopmdm.model.errors import UsageError, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import Sequences

Values = dict[tuple[int, int], Tensor]
"""By (loop, looped layer): what the keys hand on, [batch, pos, head, d_head]."""


@torch.no_grad()
def record_values(
    m: HookedLoopMDM, tokens: Int[Tensor, "batch pos"], n_loops: int, attention_mask: Tensor | None = None
) -> Values:
    """The values of the looped layers in every loop of one run; under the open contexts, if there are any."""
    check_model(m, "record_values", hooked=True)
    found: Values = {}

    def keep(value: Tensor, hook: Any) -> None:
        found[hook.loop(), hook.layer()] = value.clone()

    with m.hooks([(applications(m.cfg, None, None, "v"), keep)]):
        for _ in m.states(tokens, n_loops, attention_mask):
            pass
    return found


def mean_values(several: Sequence[Values]) -> Values:
    """Their mean, place by place."""
    return {place: torch.stack([values[place] for values in several]).mean(0) for place in several[0]}


@contextmanager
def replace_values(
    m: HookedLoopMDM,
    values: Values,
    what: str | Choose = "masked->masked",
    loops: Loops = slice(1, None),
    heads: Chosen = None,
) -> Iterator[HookedLoopMDM]:
    """Along the edges `what` keys hand on `values` (`record_values` of as many sequences) in place of their own.

    Attention is explicit in all layers, as under `cut`: cut(m, "none") is what it is compared with. UsageError
    where a loop runs of which no values are there.
    """
    check_model(m, "replace_values", hooked=True)
    if not isinstance(values, dict):
        raise UsageError(f"values are those of record_values, got {values!r:.60}")
    places = {leaf: applications(m.cfg, loops, None, leaf) for leaf in ("v", "pattern", "z")}
    chosen = several("head", heads, m.cfg.n_heads)
    check_edges(what)

    def keep(value: Tensor, hook: Any) -> None:  # noqa: ARG001
        m.call.notes[keep] = value

    def weigh(pattern: Tensor, hook: Any) -> None:  # noqa: ARG001
        context = m.context
        found = edges(context, what)[:, None] if isinstance(what, str) else what(pattern, context)
        m.call.notes[weigh] = pattern * in_heads(found, chosen, m.cfg.n_heads)

    def add(z: Tensor, hook: Any) -> Tensor:
        other, own = _there(values, hook), m.call.notes[keep]
        if other.shape != own.shape:
            raise UsageError(f"the values have shape {list(other.shape)}, the run's {list(own.shape)}")
        return z + torch.einsum("bhqk,bkhd->bqhd", m.call.notes[weigh], other - own)

    with m.attention_path("eager"), m.hooks([(places["v"], keep), (places["pattern"], weigh), (places["z"], add)]):
        yield m


def _there(values: Values, hook: Any) -> Tensor:
    place = hook.loop(), hook.layer()
    if place not in values:
        raise UsageError(f"no values of loop {place[0]}, layer {place[1]} are there; record more loops")
    return values[place]


def donors(sequences: Sequences, seed: int, draw: int) -> Int[np.ndarray, " batch"]:
    """For each sequence the number of another one, of another document where several share one, at random.

    UsageError where there is none, or where sequences differ in what may be masked: they cannot swap masks.
    """
    owners, allowed = sequences.owners, sequences.allowed
    if sequences.real is not None or not bool((allowed == allowed[:1]).all()):
        raise UsageError(
            "values of another sequence need sequences that may be masked at the same positions, without padding; "
            'these differ: use arms of kind "cut"'
        )
    others = [np.flatnonzero(owners != owner) for owner in owners]
    if not all(map(len, others)):
        raise UsageError("values of another sequence need sequences of two documents at least, got one")
    place = row_uniforms(seed, "donors", len(owners), 1, step=draw)[:, 0].numpy()
    return np.array([some[int(u * len(some))] for some, u in zip(others, place, strict=True)])
