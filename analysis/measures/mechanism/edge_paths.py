"""Path patching over loops: a message along one edge, held by who heard it, and handed on along the next.

    hop 1   in loop i its queries read the corrupted run along the hop's edges; nobody else hears anything new
    held    until the next hop's loop each query keeps what it heard: its own stream goes on, every other position
            reads the clean run's keys and values of it
    hop 2   in loop j > i its queries, their own streams clean so far, read the holders' keys and values
    ..      the last hop's queries keep what they heard, all others are put back to clean, and the model runs on

So what is measured is the path corrupted token -> relay -> receiver alone: direct messages to the receiver, and
what the relay says at other times or to others, are clean. After Wang et al. 2022 and Goldowsky-Dill et al. 2023;
nodes here are positions in loops, and what a position says to itself inside a loop belongs to the node.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.mechanism.edges import EdgeStudy, Messages, Recorder, read_edges
from loopmdm.model.errors import UsageError, check_count
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sequences import MaskedBatch


@dataclass(frozen=True, eq=False)
class Hop:
    """Edges [batch, query, key] of one loop, none from a position to itself."""

    loop: int
    edges: Bool[Tensor, "batch query key"]

    def __post_init__(self):
        """A loop's number, and edges between different positions."""
        check_count("loop", self.loop, least=0)
        if not isinstance(self.edges, Tensor) or self.edges.dtype != torch.bool or self.edges.ndim != 3:
            raise UsageError("a hop's edges must be boolean, [batch, query, key]")
        if bool(self.edges.diagonal(dim1=-2, dim2=-1).any()):
            raise UsageError("a hop leads to another position; what one keeps to itself needs no edge")

    @property
    def queries(self) -> Bool[Tensor, "batch pos"]:
        """Who hears."""
        return self.edges.any(-1)


def path_patching(
    m: HookedLoopMDM,
    b: MaskedBatch,
    corrupt: Int[Tensor, "batch pos"],
    hops: Sequence[Hop],
    n_loops: int | None = None,
) -> dict[str, Float[Tensor, " batch"]]:
    """What a path carried, nats by sequence and metric (`edges.METRICS`); hops in rising order of loops.

    The first hop's keys speak as in the run on `corrupt`.
    """
    study = EdgeStudy.of(m, b, corrupt, n_loops)
    return study.by_sequence(study.lost(along_path(study, hops)))


@torch.no_grad()
def along_path(study: EdgeStudy, hops: Sequence[Hop]) -> Float[Tensor, "row d_vocab"]:
    """The answer where only the path's messages are the corrupted run's."""
    loops = [hop.loop for hop in hops]
    if not loops or sorted(set(loops)) != loops or loops[-1] >= study.n_loops:
        raise UsageError(f"a path needs hops in rising loops of 0..{study.n_loops - 1}, got {loops}")
    source, state = study.corrupt.messages, study.clean.states[0]
    for hop, following in zip(hops, [*hops[1:], None], strict=True):
        state = hear(study, hop, source)
        if following is not None:
            source = hold(study, state, hop.loop + 1, following.loop)
    return study.onward(state, loops[-1] + 1)


@torch.no_grad()
def hear(study: EdgeStudy, hop: Hop, source: Messages) -> Float[Tensor, "batch pos d_model"]:
    """H(loop) where a hop's queries read `source` along its edges and clean keys else; all others are clean."""
    rest = _others(hop.edges) & ~hop.edges
    with read_edges(study.m, [(hop.edges, source), (rest, study.clean.messages)], hop.loop):
        heard = study.m.loop(study.clean.states[hop.loop], study.clean.context, hop.loop)
    return torch.where(hop.queries[..., None], heard, study.clean.states[hop.loop + 1])


@torch.no_grad()
def hold(study: EdgeStudy, state: Float[Tensor, "batch pos d_model"], first: int, last: int) -> Messages:
    """What positions say in loop `last` whose streams went on from H(first - 1) without being heard by others."""
    rest, m, recorder = _others(state), study.m, Recorder()
    with read_edges(m, [(rest, study.clean.messages)]):
        for loop in range(first, last):
            state = m.loop(state, study.clean.context, loop)
        with m.hooks(recorder.hooks(m)[:3]):
            m.loop(state, study.clean.context, last)
    return Messages(recorder.keys, recorder.values, study.clean.messages.scale)


def _others(like: Tensor) -> Bool[Tensor, "batch query key"]:
    """All edges between different positions."""
    n = like.shape[1]
    return ~torch.eye(n, dtype=torch.bool, device=like.device).expand(len(like), n, n)
