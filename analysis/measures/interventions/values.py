"""What keys hand on, replaced along some edges: attention keeps its pattern, mass and scale, only content changes.

    z_q = sum_k A_qk v_k   becomes   sum_k A_qk v_k + sum over chosen edges A_qk (w_k - v_k)

Resample ablation takes w from another sequence under the same mask, mean ablation the mean of several such.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from loopmdm.analysis.measures.interventions.places import Chosen, Loops, applications, in_heads, several
from loopmdm.analysis.measures.interventions.selections import Choose, as_choice
from loopmdm.model.errors import UsageError, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.randomness import row_uniforms
from loopmdm.model.sequences import Sequences

Values = dict[tuple[int, int], Tensor]
"""By (loop, looped layer): what the keys hand on, [batch, pos, head, d_head]."""
VALUE, PATTERN, REPLACED = "values: value", "values: pattern", "values: edges, and what they hand on"
"""Notes of the layer that runs, shared by nested blocks."""


@torch.no_grad()
def record_values(
    m: HookedLoopMDM,
    tokens: Int[Tensor, "batch pos"],
    n_loops: int,
    attention_mask: Tensor | None = None,
    loops: Loops = None,
) -> Values:
    """The values of the looped layers in the chosen loops (default: every) of one run; under the open contexts.

    UsageError where none of them is run.
    """
    check_model(m, "record_values", hooked=True)
    found: Values = {}

    def keep(value: Tensor, hook: Any) -> None:
        found[hook.loop(), hook.layer()] = value.clone()

    with m.hooks([(applications(m.cfg, loops, None, "v"), keep)]):
        for _ in m.states(tokens, n_loops, attention_mask):
            pass
    if not found:
        raise UsageError(f"none of the chosen loops is among the {n_loops} that are run; choose others")
    return found


def mean_values(several: Iterable[Values]) -> Values:
    """Their mean, place by place; of an iterator no more than two runs and the sum are held.

    UsageError for none, and unless all are of the same loops.
    """
    total: Values = {}
    number, dtype = 0, torch.float32
    for values in several:
        if not values or (total and values.keys() != total.keys()):
            raise UsageError("a mean of values needs the same loops of each run; give record_values of each")
        number, dtype = number + 1, next(iter(values.values())).dtype
        total = {place: total[place] + wide(v) if total else wide(v) for place, v in values.items()}
    if not number:
        raise UsageError("a mean of values needs one run at least; give record_values of some")
    return {place: (value / number).to(dtype) for place, value in total.items()}


@contextmanager
def replace_values(
    m: HookedLoopMDM,
    values: Values,
    what: str | Choose = "masked->masked",
    loops: Loops = slice(1, None),
    heads: Chosen = None,
    layers: Chosen = None,
) -> Iterator[HookedLoopMDM]:
    """Along the edges `what` keys hand on `values` (`record_values` of as many sequences) in place of their own.

    Attention is explicit in all layers, as under `cut`: cut(m, "none") is what it is compared with. Blocks nest in
    any order: values and patterns are what all of them made, and where two replace values along an edge, the inner
    one does. `layers` None: the looped ones. UsageError where a loop runs of which no values are there.
    """
    check_model(m, "replace_values", hooked=True)
    if not isinstance(values, dict):
        raise UsageError(f"values are those of record_values, got {values!r:.60}")
    places = {leaf: applications(m.cfg, loops, layers, leaf) for leaf in ("v", "pattern", "z")}
    chosen, choose = several("head", heads, m.cfg.n_heads), as_choice(m, what)

    def keep(value: Tensor, hook: Any) -> None:
        if (other := _there(values, hook)).shape != value.shape:
            raise UsageError(f"the values have shape {list(other.shape)}, the run's {list(value.shape)}")
        m.call.notes[VALUE] = value

    def weigh(pattern: Tensor, hook: Any) -> None:
        found = in_heads(choose(pattern, m.context), chosen, m.cfg.n_heads)
        before = [(on & ~found, other) for on, other in m.call.notes.get(REPLACED, ())]
        m.call.notes |= {PATTERN: pattern, REPLACED: [*before, (found, _there(values, hook))]}

    def add(z: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        notes = m.call.notes
        for on, other in notes.pop(REPLACED, ()):  # of all blocks, by the outermost
            z = z + torch.einsum("bhqk,bkhd->bqhd", notes[PATTERN] * on, other - notes[VALUE])
        return z

    keep.hears_last = weigh.hears_last = True  # pyright: ignore[reportFunctionMemberAccess]
    with m.attention_path("eager"), m.hooks([(places["v"], keep), (places["pattern"], weigh), (places["z"], add)]):
        yield m


def _there(values: Values, hook: Any) -> Tensor:
    place = hook.loop(), hook.layer()
    if place not in values:
        raise UsageError(f"no values of loop {place[0]}, layer {place[1]} are there; record more loops")
    return values[place]


CUT_ALONE = 'cut edges only, with kinds=["cut"] or arms of kind "cut"'


def donors(sequences: Sequences, seed: int, draw: int) -> Int[np.ndarray, " batch"]:
    """For each sequence the number of another one, of another document where several share one, at random.

    UsageError where there is none, or where sequences differ in what may be masked: they cannot swap masks.
    """
    owners, allowed = sequences.owners, sequences.allowed
    if sequences.real is not None or not bool((allowed == allowed[:1]).all()):
        raise UsageError(
            "values of another sequence need sequences that may be masked at the same positions, without padding; "
            f"these differ: {CUT_ALONE}"
        )
    others = [np.flatnonzero(owners != owner) for owner in owners]
    if not all(map(len, others)):
        raise UsageError(
            f"values of another sequence need sequences of two documents at least, got one: {CUT_ALONE}"
        )
    place = row_uniforms(seed, "donors", len(owners), 1, step=draw)[:, 0].numpy()
    return np.array([some[int(u * len(some))] for some, u in zip(others, place, strict=True)])
