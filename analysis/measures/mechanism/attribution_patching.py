"""Attribution patching: what patching every activation of every loop would do, to first order, at once.

    AtP(node) = (corrupted - clean activation) . df/d(activation) at the clean run, summed over positions

Two forwards and one backward for all nodes. AtP* mends two ways in which it misses nodes:

    saturation     q and k: the softmax is recomputed exactly (`saturation.py`), the rest stays linear
    cancellation   GradDrop: direct and indirect effects of opposite sign cancel in one gradient, so it is taken
                   once per layer application with that one's writes to the stream cut off the backward pass;
                   the mean of |AtP| over these L passes, times L / (L - 1), is a size without sign

What a step function hides (its gradient is 0 where the exact effect is not) it misses still: `agreement` compares
with activation patching on some sequences. Sources: Nanda 2023; Kramar et al. 2024 (arXiv 2403.00745).
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.contrast import Contrast, any_wrong, best_wrong
from loopmdm.analysis.measures.mechanism.corruption import corrupted, places
from loopmdm.analysis.measures.mechanism.nodes import BY_HEAD, LEAVES, Node
from loopmdm.analysis.measures.mechanism.patching import Effects, Pair, Places, activation_patching
from loopmdm.analysis.measures.mechanism.saturation import Scored
from loopmdm.analysis.measures.registry import Measure
from loopmdm.analysis.numbers import stats
from loopmdm.model.errors import UsageError, check_count, check_word
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import check_logits, wide
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.sites import Site, at

NAME = "attribution-patching"
PLAIN = ("z", "attn_out", "mlp_out")
STAR = (*PLAIN, "q", "k", "v")


def attribution_patching(
    m: HookedLoopMDM,
    clean: MaskedBatch,
    corrupt: MaskedBatch,
    *,
    n_loops: int | None = None,
    star: bool = False,
    places: Places | None = None,
    asked: Contrast | None = None,
    batch_size: int = 32,
) -> tuple[Effects, Effects | None]:
    """AtP of all `standard_nodes` at every place (default: everywhere); with `star` also q, k, v, and GradDrop.

    The first effects are signed, the second (None without `star`) sizes by GradDrop. UsageError as in
    `activation_patching`, and for models of one layer application where `star` is asked.
    """
    study = Pair.of(m, clean, corrupt, n_loops, NAME)
    components = [name for name in (STAR if star else PLAIN) if LEAVES[name] in m.cfg.leaves]
    if star and len(components) < len(STAR):
        lacking = next(LEAVES[name] for name in STAR if name not in components)
        raise UsageError(f"{NAME}: star=True needs {lacking}, which this model does not offer; leave star out")
    signed: dict[tuple[str, Node], list[Tensor]] = {}
    sizes: dict[tuple[str, Node], list[Tensor]] = {}
    totals: list[Tensor] = []
    for span, one, other in study.parts(batch_size):
        run = _Backward(m, study.n_loops, components, star)
        where = {name: mask[span] for name, mask in (places or {}).items()}
        where = where or {"all": torch.ones_like(one.masked)}
        totals.append(run.forward(one, other, None if asked is None else asked.of(span)))
        for key, values in run.effects(where):
            signed.setdefault(key, []).append(run.known(values))
        for key, values in run.dropped(where) if star else ():
            sizes.setdefault(key, []).append(run.known(values))
    return study.effects(signed, totals), study.effects(sizes, totals) if star else None


@dataclass
class _Backward:
    """One piece of a pair: activations of both runs, and gradients of the clean one."""

    m: HookedLoopMDM
    n_loops: int
    components: list[str]
    star: bool
    clean: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    dropped_prefix: str = ""
    asked: Contrast = field(init=False)
    metric: Tensor = field(init=False)

    def forward(self, one: MaskedBatch, other: MaskedBatch, asked: Contrast | None) -> Float[Tensor, " batch"]:
        """Both runs; f of the corrupted less that of the clean one."""
        leaves = [LEAVES[name] for name in self.components]
        scored = ["attn.hook_attn_scores", "attn.hook_pattern"] if self.star else []
        start = at(loop=None, layer=None, leaf="hook_embed"), _begin
        with torch.enable_grad(), self.m.hooks([start, (at(leaf=(*leaves, *scored)), self._note)]):
            rows = one.masked if asked is None else asked.rows
            logits = self._logits(one, rows)
            self.asked = best_wrong(self.m, one, logits.detach(), NAME) if asked is None else asked
            values = self.asked.difference(logits)
            self.metric = (values * self.asked.weights(values.dtype)).sum()
        with torch.no_grad(), self.m.hooks([(at(leaf=leaves), self._note_other)]):
            after = self.asked.difference(self._logits(other, rows))
        return self.asked.by_sequence(after - values.detach())

    def _logits(self, b: MaskedBatch, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
        logits = self.m.run(b.tokens, self.n_loops, attention_mask=b.attention_mask, rows=rows).logits
        check_logits(logits)
        return logits

    def _note(self, x: Tensor, hook: Any) -> None:
        self.clean[hook.name] = x
        if self.star and hook.name.endswith(("hook_attn_out", "hook_mlp_out")) and x.requires_grad:
            prefix = Site.parse(hook.name).prefix
            x.register_hook(lambda g: torch.zeros_like(g) if prefix == self.dropped_prefix else g)

    def _note_other(self, x: Tensor, hook: Any) -> None:
        self.other[hook.name] = x.detach().clone()

    def known(self, values: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """NaN where nothing is asked."""
        return values.masked_fill(~self.asked.rows.any(-1), float("nan"))

    # --- effects ---

    def effects(self, where: Places) -> Iterator[tuple[tuple[str, Node], Float[Tensor, " batch"]]]:
        """((place, node), [batch]) with the gradients as they are."""
        for (site, component), by_position in self._by_position():
            for place, mask in where.items():
                summed = (by_position * mask[..., None]).sum(1)
                for head in range(summed.shape[-1]):
                    one = head if component in BY_HEAD else None
                    yield (place, Node(component, site.loop, site.layer, one)), summed[:, head]

    def dropped(self, where: Places) -> Iterator[tuple[tuple[str, Node], Float[Tensor, " batch"]]]:
        """GradDrop: mean size over passes that each leave out one application, of those that can reach a node."""
        prefixes = list(dict.fromkeys(Site.parse(name).prefix for name in self.clean))
        if len(prefixes) < 2:
            raise UsageError(f"{NAME}: GradDrop needs two layer applications at least; ask for star=False")
        total: dict[tuple[str, Node], Tensor] = {}
        for self.dropped_prefix in prefixes:
            for key, values in self.effects(where):
                total[key] = total.get(key, torch.zeros_like(values)) + values.abs()
        self.dropped_prefix = ""
        yield from ((key, values / (len(prefixes) - 1)) for key, values in total.items())

    def _by_position(self) -> Iterator[tuple[tuple[Site, str], Float[Tensor, "batch pos head"]]]:
        """AtP of each site by position and head (of attention and MLP outputs one)."""
        gradients = self._gradients()
        short = {leaf: name for name, leaf in LEAVES.items()}
        for name, other in self.other.items():
            site, gradient = Site.parse(name), gradients[name]
            component = short[site.leaf]
            if component in ("q", "k"):
                yield (site, component), self._attended(site, component, gradients)
                continue
            product = ((wide(other) - wide(self.clean[name].detach())) * wide(gradient)).sum(-1)
            yield (site, component), product if product.ndim == 3 else product[..., None]

    def _gradients(self) -> dict[str, Tensor]:
        wanted = {name: x for name, x in self.clean.items() if x.requires_grad}
        found = torch.autograd.grad(self.metric, list(wanted.values()), allow_unused=True, retain_graph=self.star)
        kept = {name: g for name, g in zip(wanted, found, strict=True) if g is not None}
        return {name: kept.get(name, torch.zeros_like(x)) for name, x in self.clean.items()}

    def _attended(self, site: Site, component: str, gradients: dict[str, Tensor]) -> Tensor:
        clean, other = (
            [store[str(site.at(LEAVES[name]))].detach() for name in ("q", "k")]
            for store in (self.clean, self.other)
        )
        pattern = str(site.at("attn.hook_pattern"))
        scores = wide(self.clean[str(site.at("attn.hook_attn_scores"))].detach())
        scored = Scored(*clean, *other, scores, wide(self.clean[pattern].detach()))
        gradient = wide(gradients[pattern])
        return scored.by_query(gradient) if component == "q" else scored.by_key(gradient)


def _begin(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    """Gradients from here on, also where weights are frozen."""
    return x.detach().requires_grad_()


# --- against the exact effect ---


def agreement(exact: Effects, approximate: Effects, place: str = "all") -> pd.DataFrame:
    """How well mean effects of nodes agree: of all ("any"), of those in loops ("looped"), and by component.

    Columns: component pearson spearman sign (share of nodes whose signs agree, of those whose exact effect is not
    0) n_nodes. NaN where fewer than 3 nodes have both, or one side does not vary.
    """
    keys = [key for key in exact.values if key[0] == place and key in approximate.values]
    sides = [[float(stats.mean_and_error(side.values[key])[0]) for key in keys] for side in (exact, approximate)]
    if not keys:
        raise UsageError("agreement: the two have no node in common; ask both of the same components")
    both = pd.DataFrame({"component": [node.component for _, node in keys], "exact": sides[0],
                         "approximate": sides[1]})  # fmt: skip
    looped = both[[node.loop is not None for _, node in keys]]
    groups = [("any", both), ("looped", looped), *both.groupby("component", sort=False)]
    return pd.DataFrame([{"component": name} | _agree(part) for name, part in groups])


def _agree(part: pd.DataFrame) -> dict[str, float]:
    exact, found = (part[name].to_numpy(dtype=float) for name in ("exact", "approximate"))
    some = exact != 0
    sign = float((np.sign(exact) == np.sign(found))[some].mean()) if some.any() else float("nan")
    told = {"pearson": float("nan"), "spearman": float("nan"), "sign": sign, "n_nodes": len(part)}
    if len(part) < 3 or np.ptp(exact) == 0 or np.ptp(found) == 0:
        return told
    ranks = [pd.Series(values).rank().to_numpy() for values in (exact, found)]
    return told | {
        "pearson": float(np.corrcoef(exact, found)[0, 1]),
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
    }


def run(
    case: Case,
    b: MaskedBatch,
    n_sequences: int = 64,
    n_exact: int = 8,
    star: bool = False,
    wrong: str = "best",
) -> pd.DataFrame:
    """AtP on `n_sequences` of a batch with one clean token changed; beside it the exact effect on `n_exact`.

    Columns of `Effects.frame`, and exact, exact_se, approximate (AtP on the same sequences), n_exact, and over
    nodes in loops pearson, spearman and sign; with `star` graddrop. `wrong`: against the "best" wrong token of the
    clean run, whose luck any change undoes, or "any" at random. A batch without clean tokens has no rows.
    """
    m, few = case.m, check_count("n_exact", n_exact)
    check_word("wrong", wrong, ("best", "any"))
    b = b.rows(torch.linspace(0, len(b) - 1, min(check_count("n_sequences", n_sequences), len(b))).long())
    try:
        other = corrupted(m, b, case.seed)
    except UsageError as error:
        warnings.warn(str(error), stacklevel=2)
        return pd.DataFrame()
    differ = (b.tokens != other.tokens).any(-1)
    b, other = b.rows(differ), other.rows(differ)
    asked = any_wrong(m, b, case.seed, NAME) if wrong == "any" else None
    found, sizes = attribution_patching(
        m, b, other, n_loops=case.n_loops, star=star, places=places(m, b, other), asked=asked
    )
    frame = found.frame().drop(columns="position")
    if sizes is not None:
        frame["graddrop"] = sizes.frame()["value"]
    spread = np.linspace(0, len(b) - 1, min(few, len(b))).astype(int)
    asked = None if asked is None else asked.of(spread)
    exact = activation_patching(m, b.rows(spread), other.rows(spread), n_loops=case.n_loops, asked=asked)
    return _beside(frame, exact, _some(found, spread)).assign(mask_ratio=b.mask_ratio)


def _some(effects: Effects, keep: np.ndarray) -> Effects:
    values = {key: part[keep] for key, part in effects.values.items()}
    clusters = None if effects.clusters is None else effects.clusters[keep]
    return Effects(effects.m, values, effects.total[keep], clusters)


def _beside(frame: pd.DataFrame, exact: Effects, approximate: Effects) -> pd.DataFrame:
    """With the exact effects, AtP on the same sequences, and how far they agree."""
    keys = ["place", "component", "loop", "layer", "head"]
    told = exact.frame()[[*keys, "value", "standard_error", "n"]]
    told = told.rename(columns={"value": "exact", "standard_error": "exact_se", "n": "n_exact"})
    same = approximate.frame()[[*keys, "value"]].rename(columns={"value": "approximate"})
    over = agreement(exact, approximate).set_index("component").loc["looped"]
    frame = frame.merge(told.merge(same, on=keys), on=keys, how="left")
    return frame.assign(**{name: float(over[name]) for name in ("pearson", "spearman", "sign")})


MEASURES = (
    Measure(
        NAME,
        "what a changed clean token does through each head and MLP of each loop, by gradient and by patching",
        run,
        needs=("fixed_start", "nested"),
        groupless=run,
    ),
)
