"""Edge patching: along chosen edges of chosen loops queries read what keys say in another run, all else as it is.

An edge is (loop i, key position k -> query position q) of the looped layers' attention. Along chosen edges E the
corrupted run's keys AND values are read: with q the query as it is now, k', v' those of the other run,

    s'_qk = s_qk + [qk in E] c q.(k'_k - k_k),    z_q = sum_k softmax(s')_qk (v_k + [qk in E] (v'_k - v_k))

c is the model's own scale. What the edges carried is what the answer loses:

    difference    logit(true) - logit(best wrong one), clean less patched; above 0 the edges spoke for the truth
    kl            KL(clean || patched) of the answer, nats: whatever they said, it mattered so much
    loss          cross-entropy of the truth, patched less clean

Edges: Wang et al. 2022 ("Interpretability in the wild"), Goldowsky-Dill et al. 2023 ("Localizing model behavior
with path patching"), there between heads; here between positions and loops, as looped layers share their heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopmdm.analysis.measures.interventions.places import Chosen, Loops, applications, in_heads, several
from loopmdm.analysis.measures.interventions.values import Values
from loopmdm.analysis.measures.mechanism.contrast import Contrast, contrast, questions
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_model
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.information import kl
from loopmdm.model.precision import wide
from loopmdm.model.sequences import MaskedBatch

Edges = Bool[Tensor, "batch query key"] | Bool[Tensor, "batch head query key"]
METRICS = ("difference", "kl", "loss")
NEEDED = ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_z")
NARROW = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far scores may lie from scale x query.key, of the largest one."""


@dataclass(frozen=True, eq=False)
class Messages:
    """What keys say: `keys` and `values` by (loop, looped layer), [batch, pos, head, d_head]; `scale` by layer."""

    keys: Values
    values: Values
    scale: dict[int, float]

    def mixed(self, other: "Messages", share: float) -> "Messages":
        """These, moved by a `share` of the way to others."""
        keys, values = (
            {place: torch.lerp(mine[place], theirs[place], share) for place in mine}
            for mine, theirs in ((self.keys, other.keys), (self.values, other.values))
        )
        return Messages(keys, values, self.scale)


@dataclass(frozen=True, eq=False)
class Recorded:
    """One run on the explicit path: H(-1), H(0), .. and what keys said on the way."""

    states: list[Float[Tensor, "batch pos d_model"]]
    context: Context
    messages: Messages


def check_hearing(m: HookedLoopMDM, name: str) -> None:
    """UsageError where a model has no hooks, or none at the keys and scores of its attention."""
    check_model(m, name, hooked=True)
    m.facts.need("nested", by=name)
    for leaf in NEEDED:
        if leaf not in m.cfg.leaves:
            raise UsageError(f"{name} needs {leaf}, which this model does not offer (cfg.leaves)")


@torch.no_grad()
def record_messages(
    m: HookedLoopMDM, tokens: Int[Tensor, "batch pos"], n_loops: int, attention_mask: Tensor | None = None
) -> Recorded:
    """A run as it is, under the open contexts.

    UsageError where scores are no multiple of query times key (a bias or a cap comes between).
    """
    check_hearing(m, "record_messages")
    recorder = Recorder()
    with m.attention_path("eager"), m.hooks(recorder.hooks(m)):
        found = list(m.states(tokens, n_loops, attention_mask))
    states = [recorder.start[0], *(state for state, _ in found)]
    return Recorded(states, found[-1][1], Messages(recorder.keys, recorder.values, recorder.scale))


class Recorder:
    """Keys and values of all applications, and each layer's scale."""

    def __init__(self):
        self.keys: Values = {}
        self.values: Values = {}
        self.scale: dict[int, float] = {}
        self.start: list[Tensor] = []
        self.query: Tensor | None = None

    def hooks(self, m: HookedLoopMDM) -> list:
        """For `m.hooks`; the first three hear queries, keys and values."""

        def keep(store: Values) -> Any:
            def hear(x: Tensor, hook: Any) -> None:
                store[hook.loop(), hook.layer()] = x.clone()

            return hear

        def ask(x: Tensor, hook: Any) -> None:  # noqa: ARG001
            self.query = x

        def measure(scores: Tensor, hook: Any) -> None:
            assert self.query is not None
            if hook.layer() not in self.scale:
                keys = self.keys[hook.loop(), hook.layer()]
                self.scale[hook.layer()] = _scale(scores, self.query, keys)

        pairs = {"rot_q": ask, "rot_k": keep(self.keys), "v": keep(self.values), "attn_scores": measure}
        found = [(applications(m.cfg, None, None, leaf), hear) for leaf, hear in pairs.items()]
        for _, hear in found:
            hear.hears_last = True
        return [*found, ("loop.0.hook_in", lambda x, hook: self.start.append(x.clone()))]  # noqa: ARG005


def _scale(scores: Tensor, query: Tensor, key: Tensor) -> float:
    """The c of scores = c query.key, found where they are no padding; UsageError where there is no such c."""
    product = torch.einsum("bqhd,bkhd->bhqk", wide(query).double(), wide(key).double())
    seen = scores > PADDING
    product, wanted = product[seen], scores[seen].double()
    square = float(product.square().sum())
    found = float((product * wanted).sum()) / square if square else query.shape[-1] ** -0.5
    off = float((wanted - found * product).abs().max()) if len(wanted) else 0.0
    largest = float(wanted.abs().max()) if len(wanted) else 0.0
    if off > NARROW.get(scores.dtype, 3e-2) * max(largest, 1e-30):
        raise UsageError(
            "edge patching needs scores that are a multiple of query times key; in this model a bias or a cap "
            "comes between (scores differ from it by more than rounding)"
        )
    return found


PADDING = -1e4
"""Scores below are no keys at all."""


@contextmanager
def read_edges(
    m: HookedLoopMDM, sent: Sequence[tuple[Edges, Messages]], loops: Loops = None, heads: Chosen = None
) -> Iterator[HookedLoopMDM]:
    """Along edges [batch, query, key] (or by head) queries read messages of another run, in the chosen loops.

    `sent`: pairs of edges and what they carry; no edge in two of them. Attention is explicit in all layers.
    UsageError where a loop runs of which no messages are there.
    """
    check_hearing(m, "read_edges")
    chosen = several("head", heads, m.cfg.n_heads)
    for edges, _ in sent:
        if not isinstance(edges, Tensor) or edges.dtype != torch.bool or edges.ndim not in (3, 4):
            raise UsageError("edges must be boolean, [batch, query, key] or [batch, head, query, key]")
    pairs = [(in_heads(_by_head(edges), chosen, m.cfg.n_heads), messages) for edges, messages in sent]
    reader = _Reader(pairs)
    hooks = {"rot_q": reader.ask, "rot_k": reader.offer, "v": reader.tell, "attn_scores": reader.score,
             "pattern": reader.weigh, "z": reader.add}  # fmt: skip
    with (
        m.attention_path("eager"),
        m.hooks([(applications(m.cfg, loops, None, leaf), hear) for leaf, hear in hooks.items()]),
    ):
        yield m


def _by_head(edges: Edges) -> Bool[Tensor, "batch head query key"]:
    return edges if edges.ndim == 4 else edges[:, None]


class _Reader:
    """What one application of a layer is told, piece by piece in running order."""

    def __init__(self, pairs: list[tuple[Tensor, Messages]]):
        self.pairs = pairs
        self.now: dict[str, Tensor] = {}
        self.ask, self.offer, self.tell, self.weigh = (self._keep(name) for name in ("q", "k", "v", "pattern"))

    def _keep(self, name: str) -> Any:
        def hear(x: Tensor, hook: Any) -> None:  # noqa: ARG001
            self.now[name] = x

        hear.hears_last = hear.reads_only = True  # pyright: ignore[reportFunctionMemberAccess]
        return hear

    def score(self, scores: Tensor, hook: Any) -> Tensor:
        place, query, key = (hook.loop(), hook.layer()), wide(self.now["q"]), wide(self.now["k"])
        for edges, messages in self.pairs:
            if edges.shape[-2:] != scores.shape[-2:] or len(edges) not in (1, len(scores)):
                size = [len(scores), *scores.shape[-2:]]
                raise UsageError(
                    f"edges are {[len(edges), *edges.shape[-2:]]}; [batch, query, key] is {size} here"
                )
            apart = wide(_there(messages.keys, place, self.now["k"])) - key
            more = messages.scale[place[1]] * torch.einsum("bqhd,bkhd->bhqk", query, apart)
            scores = torch.where(edges, scores + more.to(scores.dtype), scores)
        return scores

    def add(self, z: Tensor, hook: Any) -> Tensor:
        place, pattern, value = (hook.loop(), hook.layer()), self.now["pattern"], self.now["v"]
        for edges, messages in self.pairs:
            apart = _there(messages.values, place, value) - value
            z = z + torch.einsum("bhqk,bkhd->bqhd", pattern * edges, apart)
        return z


def _there(found: Values, place: tuple[int, int], like: Tensor) -> Tensor:
    if place not in found:
        raise UsageError(f"no messages of loop {place[0]}, layer {place[1]} are there; record more loops")
    if found[place].shape != like.shape:
        raise UsageError(f"the messages have shape {list(found[place].shape)}, the run's {list(like.shape)}")
    return found[place]


@dataclass(frozen=True, eq=False)
class EdgeStudy:
    """Two runs of a batch on the explicit path, clean and corrupted, and what is asked of them.

    `batch` as `questions` gives it; `logits` [row, d_vocab] are the clean answer at n_loops.
    """

    m: HookedLoopMDM
    batch: MaskedBatch
    asked: Contrast
    clean: Recorded
    corrupt: Recorded
    n_loops: int
    logits: Float[Tensor, "row d_vocab"]

    @classmethod
    @torch.no_grad()
    def of(
        cls, m: HookedLoopMDM, b: MaskedBatch, corrupt: Int[Tensor, "batch pos"], n_loops: int | None = None
    ) -> "EdgeStudy":
        """`corrupt`: other tokens of the same shape, hidden at the same positions; see `corrupted`."""
        check_hearing(m, "edge patching")
        n_loops, told = check_loops(m, n_loops), questions("edge patching", m, b)
        if not isinstance(corrupt, Tensor) or corrupt.shape != told.tokens.shape:
            raise UsageError(
                f"the corrupted tokens must have the shape of the clean ones, {list(told.tokens.shape)}"
            )
        if not torch.equal(m.cfg.hidden(corrupt), m.cfg.hidden(told.tokens)):
            raise UsageError("clean and corrupted tokens must be masked at the same positions; see corrupted")
        asked = contrast(m, b, n_loops, "edge patching")
        clean, other = (
            record_messages(m, tokens, n_loops, told.attention_mask) for tokens in (told.tokens, corrupt)
        )
        with m.attention_path("eager"):
            logits = wide(m.readout(clean.states[-1], clean.context, rows=asked.rows))
        return cls(m, told, asked, clean, other, n_loops, logits)

    def patched(self, edges: Edges, loops: Sequence[int], heads: Chosen = None) -> Float[Tensor, "row d_vocab"]:
        """The answer where edges carry the corrupted run's messages in some loops."""
        with read_edges(self.m, [(edges, self.corrupt.messages)], list(loops), heads):
            return self.onward(self.clean.states[min(loops)], min(loops))

    @torch.no_grad()
    def onward(self, state: Tensor, loop: int) -> Float[Tensor, "row d_vocab"]:
        """The answer from `state` = H(loop - 1) on, under the open contexts."""
        with self.m.attention_path("eager"):
            for number in range(loop, self.n_loops):
                state = self.m.loop(state, self.clean.context, number)
            return wide(self.m.readout(state, self.clean.context, rows=self.asked.rows))

    def lost(self, logits: Float[Tensor, "row d_vocab"]) -> dict[str, Float[Tensor, " row"]]:
        """What another answer lost against the clean one, by metric."""
        before, after = self.logits.log_softmax(-1), logits.log_softmax(-1)
        truth = self.asked.right[:, None]
        return {
            "difference": self.asked.difference(self.logits) - self.asked.difference(logits),
            "kl": kl(before, after).clamp(min=0.0),
            "loss": (before.gather(-1, truth) - after.gather(-1, truth))[:, 0],
        }

    def by_sequence(self, lost: dict[str, Float[Tensor, " row"]]) -> dict[str, Float[Tensor, " batch"]]:
        """Means over each sequence's rows."""
        return {metric: self.asked.by_sequence(values) for metric, values in lost.items()}


def edge_patching(
    m: HookedLoopMDM,
    b: MaskedBatch,
    corrupt: Int[Tensor, "batch pos"],
    edges: Edges,
    loops: Sequence[int] | None = None,
    heads: Chosen = None,
    n_loops: int | None = None,
) -> dict[str, Float[Tensor, " batch"]]:
    """What some edges carried in some loops (default: all), nats by sequence and metric (`METRICS`).

    `edges` [batch, query, key], or by head; of groups: `edge_groups`. Repeated calls: `EdgeStudy.of`, once.
    """
    study = EdgeStudy.of(m, b, corrupt, n_loops)
    chosen = range(study.n_loops) if loops is None else list(loops)
    for loop in chosen:
        if not 0 <= loop < study.n_loops:
            raise UsageError(f"loops run from 0 to {study.n_loops - 1}, got {loop}")
    return study.by_sequence(study.lost(study.patched(edges, chosen, heads)))
