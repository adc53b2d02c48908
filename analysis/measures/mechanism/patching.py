"""Activation patching: one activation of another run is put in, and what that does to the answer is read off.

    effect = f(clean run with the node's corrupted activation) - f(clean run)            "noising"
    effect = f(corrupted run with the node's clean activation) - f(corrupted run)        "denoising"

f is the logit difference true - wrong of the clean run (`Contrast`), mean over a sequence's rows, in nats. A node
is an activation of one loop: a head's z (or q, k, v), what attention or an MLP adds, or the state H(loop), at all
positions, at one, or at places that differ by sequence. The runs differ in one token: `corrupted`. Sources: Vig et
al. 2020; Meng et al. 2022; Zhang & Nanda 2024 (arXiv 2309.16042) for differences and both directions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopmdm.analysis.measures.mechanism.contrast import Contrast, best_wrong, questions
from loopmdm.analysis.measures.mechanism.corruption import check_pair
from loopmdm.analysis.measures.mechanism.nodes import Node, listed, standard_nodes
from loopmdm.analysis.numbers import stats
from loopmdm.analysis.watch.states import check_loops
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_model, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import check_logits
from loopmdm.model.sequences import MaskedBatch

Direction = Literal["noising", "denoising"]
Places = Mapping[str, Bool[Tensor, "batch pos"]]
NAME = "activation patching"


@dataclass(frozen=True, eq=False)
class Effects:
    """By (place, node) the effect on every sequence [batch], nats; `total` [batch]: f of the corrupted less clean.

    Noising effects lie between 0 and `total` where a node carries all of it, denoising ones between 0 and -total.
    """

    m: HookedLoopMDM
    values: dict[tuple[str, Node], np.ndarray]
    total: np.ndarray
    clusters: np.ndarray | None = None

    def frame(self) -> pd.DataFrame:
        """Columns: place component segment loop layer head position value standard_error n size total.

        Means over sequences, errors over them or their documents; `size` is the mean of |value|, where changes of
        either sign do not cancel; `total` is the mean of the whole effect.
        """
        whole, _, _ = stats.mean_and_error(self.total, self.clusters)
        rows = []
        for (place, node), values in self.values.items():
            mean, error, n = stats.mean_and_error(values, self.clusters)
            segment = None if node.layer is None else self.m.cfg.segment(node.layer)
            told = {name: getattr(node, name) for name in ("loop", "layer", "head", "position")}
            told |= {"value": float(mean), "standard_error": float(error), "n": int(n)}
            told |= {"size": float(stats.mean_and_error(np.abs(values))[0]), "total": float(whole)}
            rows.append({"place": place, "component": node.component, "segment": segment} | told)
        return pd.DataFrame(rows).astype(dict.fromkeys(("loop", "layer", "head", "position"), "Int64"))


Activations = dict[str, Tensor]
"""By hook name."""


@contextmanager
def patched(
    m: HookedLoopMDM, nodes: Sequence[Node], values: Activations, where: Bool[Tensor, "batch pos"] | None = None
) -> Iterator[HookedLoopMDM]:
    """Put `values` (of `record_nodes`) in at all `nodes` at once; `where` are positions by sequence (None: all).

    UsageError where a node's value was not recorded, or has another shape than the run's.
    """
    check_model(m, "patched", hooked=True)
    by_site: dict[str, list[Node]] = {}
    for node in listed(nodes):
        by_site.setdefault(str(node.site), []).append(node)
    missing = [name for name in by_site if name not in values]
    if missing:
        raise UsageError(f"{missing[0]} was not recorded; give it to record_nodes")

    def put(x: Tensor, hook: Any) -> Tensor:
        other = values[hook.name]
        if other.shape != x.shape:
            raise UsageError(f"the value to put in has shape {list(other.shape)}, the run's {list(x.shape)}")
        chosen = torch.zeros(x.shape[: 3 if x.ndim == 4 else 2], dtype=torch.bool, device=x.device)
        for node in by_site[hook.name]:
            at = slice(None) if node.position is None else node.position
            chosen[(slice(None), at) if node.head is None else (slice(None), at, node.head)] = True
        if where is not None:
            chosen &= where[..., None] if x.ndim == 4 else where
        return torch.where(chosen[..., None], other, x)

    with m.hooks([(name, put) for name in by_site]):
        yield m


@torch.no_grad()
def record_nodes(
    m: HookedLoopMDM,
    b: MaskedBatch,
    nodes: Iterable[Node],
    n_loops: int | None = None,
) -> Activations:
    """The activations of nodes in the run of `b`, what other nodes of their sites hold included."""
    n_loops, nodes = check_loops(m, n_loops), listed(nodes)
    for node in nodes:
        node.check(m, n_loops, b.tokens.shape[1])
    return _Arm.of(m, b, n_loops, {str(node.site) for node in nodes}).kept


@dataclass(frozen=True)
class _Arm:
    """A run: its states H(-1) .. H(S-1), its logits, and what was kept of it."""

    states: list[Tensor]
    context: Context
    logits: Float[Tensor, "batch pos d_vocab"]
    kept: Activations

    @classmethod
    def of(cls, m: HookedLoopMDM, b: MaskedBatch, n_loops: int, names: set[str]) -> "_Arm":
        kept: Activations = {}

        def keep(x: Tensor, hook: Any) -> None:
            kept[hook.name] = x.detach().clone()

        with m.hooks([(name, keep) for name in sorted({*names, "loop.0.hook_in"})]):
            pairs = list(m.states(b.tokens, n_loops, b.attention_mask))
            context = pairs[-1][1]
            logits = m.readout(pairs[-1][0], context)
        check_logits(logits[b.real])
        return cls([kept["loop.0.hook_in"], *(state for state, _ in pairs)], context, logits, kept)

    def again(self, m: HookedLoopMDM, b: MaskedBatch, node: Node) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits under the open contexts, run from the last state that `node` does not touch."""
        n_loops = len(self.states) - 1
        if node.layer is not None and m.cfg.segment(node.layer) == "prelude":
            *_, (state, context) = m.states(b.tokens, n_loops, b.attention_mask)
            return m.readout(state, context)
        if node.layer is not None and m.cfg.segment(node.layer) == "coda":
            return m.readout(self.states[-1], self.context)
        first = max(node.loop or 0, 0)
        state = self.states[first]
        for loop in range(first, n_loops):
            state = m.loop(state, self.context, loop)
        return m.readout(state, self.context)


@torch.no_grad()
def activation_patching(
    m: HookedLoopMDM,
    clean: MaskedBatch,
    corrupt: MaskedBatch,
    nodes: Sequence[Node] | None = None,
    *,
    n_loops: int | None = None,
    direction: Direction = "noising",
    places: Places | None = None,
    asked: Contrast | None = None,
    batch_size: int = 64,
) -> Effects:
    """The effect of every node (default: `standard_nodes`), one run each, at every place (default: everywhere).

    `asked`: rows and tokens of the clean batch; default: the true one against the best wrong one of the clean run,
    which is best by its luck, too: any change, also of an untrained model, sets it back on average, by more than
    0. `any_wrong` has no such drift. UsageError for a pair of other shapes or masks, for nodes that do not exist,
    and where the corruption changes nothing.
    """
    check_word("direction", direction, get_args(Direction))
    check_model(m, NAME, hooked=True)
    m.facts.need("nested", by=NAME)
    study = Pair.of(m, clean, corrupt, n_loops, NAME)
    nodes = standard_nodes(m, study.n_loops) if nodes is None else listed(nodes)
    for node in nodes:
        node.check(m, study.n_loops, clean.tokens.shape[1])
    names = {str(node.site) for node in nodes}
    found: dict[tuple[str, Node], list[Tensor]] = {}
    totals: list[Tensor] = []
    for span, one, other in study.parts(batch_size):
        arms = [_Arm.of(m, b, study.n_loops, names) for b in (one, other)]
        told = best_wrong(m, one, arms[0].logits[one.masked], NAME) if asked is None else asked.of(span)
        metrics = [_metric(told, arm.logits) for arm in arms]
        totals.append(metrics[1] - metrics[0])
        base, given = (0, 1) if direction == "noising" else (1, 0)
        for place, where in _spanned(places, span):
            for node in nodes:
                with patched(m, [node], arms[given].kept, where):
                    logits = arms[base].again(m, (one, other)[base], node)
                found.setdefault((place, node), []).append(_metric(told, logits) - metrics[base])
    return study.effects(found, totals)


def _metric(asked: Contrast, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
    return asked.by_sequence(asked.difference(logits[asked.rows]))


def _spanned(places: Places | None, span: slice) -> Iterator[tuple[str, Tensor | None]]:
    if places is None:
        yield "all", None
        return
    for name, where in places.items():
        yield name, where[span]


@dataclass(frozen=True, eq=False)
class Pair:
    """A clean batch and a corrupted one, as a model is asked them."""

    m: HookedLoopMDM
    clean: MaskedBatch
    corrupt: MaskedBatch
    n_loops: int
    by: str

    @classmethod
    def of(
        cls, m: HookedLoopMDM, clean: MaskedBatch, corrupt: MaskedBatch, n_loops: int | None, by: str
    ) -> "Pair":
        """Checked: one shape, the same masks, something changed, a first state that is not drawn."""
        check_model(m, by, hooked=True)
        m.facts.need("fixed_start", by=by)
        if not bool(check_pair(by, clean, corrupt).any()):
            raise UsageError(f"{by}: clean and corrupted are the same, so there is no effect to attribute")
        return cls(m, questions(by, m, clean), questions(by, m, corrupt), check_loops(m, n_loops), by)

    def parts(self, batch_size: int) -> Iterator[tuple[slice, MaskedBatch, MaskedBatch]]:
        """(span, clean, corrupted) in pieces."""
        for start, one in self.clean.batches(batch_size):
            span = slice(start, start + len(one))
            yield span, one, self.corrupt.rows(span)

    def effects(self, found: dict[tuple[str, Node], list[Tensor]], totals: list[Tensor]) -> Effects:
        """Put together; UsageError where the corruption changed no answer."""
        total = torch.cat(totals).double().cpu().numpy()
        if not np.nan_to_num(total).any():
            raise UsageError(f"{self.by}: the corruption changes no answer, so there is no effect to attribute")
        values = {key: torch.cat(parts).double().cpu().numpy() for key, parts in found.items()}
        return Effects(self.m, values, total, self.clean.clusters)
