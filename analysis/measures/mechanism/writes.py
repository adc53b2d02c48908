"""What layers write to the residual stream, kept from one run and asked for its share of any direction.

w . g = z . (W_O^T g)      for a head's write w = W_O z, so that no [batch, pos, head, d_model] is made
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loopmdm.model.errors import UsageError
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.precision import wide
from loopmdm.model.sites import Filter, Site, at

KINDS = {"hook_embed": "embed", "hook_attn_out": "attention", "hook_mlp_out": "mlp"}


@dataclass(frozen=True)
class Part:
    """A write ("embed", "head", "attention" of all heads, "attention bias", "mlp"), "bias", "rest", "interaction".

    `loop` is None outside the loop, `layer` outside layers, `head` for what is of no one head.
    """

    kind: str
    loop: int | None = None
    layer: int | None = None
    head: int | None = None


def attention_leaf(m: HookedLoopMDM) -> str:
    """Heads one by one where W_O alone stands between them and the stream, else what attention adds."""
    by_head = m.facts.linear_heads and "attn.hook_z" in m.cfg.leaves
    return "attn.hook_z" if by_head else "hook_attn_out"


def need_writes(m: HookedLoopMDM, by: str) -> None:
    """UsageError, said by `by`, where a model's layers do not offer what they write."""
    for leaf in (attention_leaf(m), "hook_mlp_out"):
        if leaf not in m.cfg.leaves:
            raise UsageError(f"{by} needs what layers write; this model's offer no {leaf}")


@dataclass(frozen=True, eq=False)
class Writes:
    """Writes of one run by hook name, filled by the hook `rule()`, in running order, float32 or wider."""

    m: HookedLoopMDM
    kept: dict[str, Tensor] = field(default_factory=dict, repr=False)
    weights: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def rule(self) -> tuple[Filter, Callable]:
        """The hook that keeps what is written while it holds."""

        def keep(x: Tensor, hook: Any) -> None:
            self.kept[hook.name] = wide(x.detach()).clone()  # native code may go on to write into it

        leaves = at(loop=None, layer=None, leaf="hook_embed") | at(leaf=(attention_leaf(self.m), "hook_mlp_out"))
        return leaves, keep

    def shares(
        self, direction: Float[Tensor, "batch pos d_model"], coda: bool
    ) -> Iterator[tuple[Part, Float[Tensor, " batch"]]]:
        """Each write's product with a direction, summed over positions; the coda's own only with `coda`."""
        pulled: dict[int, Tensor] = {}  # W_O^T g, by physical layer
        for site, value in self._sites(coda):
            if site.layer is None or site.leaf != "attn.hook_z":
                yield Part(KINDS[site.leaf], site.loop, site.layer), torch.einsum("bpm,bpm->b", value, direction)
                continue
            if site.layer not in pulled:
                pulled[site.layer] = torch.einsum("bpm,mhd->bphd", direction, self._output(site.layer))
            for head, share in enumerate(torch.einsum("bphd,bphd->hb", value, pulled[site.layer])):
                yield Part("head", site.loop, site.layer, head), share
            if (bias := self._bias(site.layer)) is not None:
                yield Part("attention bias", site.loop, site.layer), (direction @ bias).sum(-1)

    def vectors(self) -> Iterator[tuple[Part, Float[Tensor, "*batch_pos d_model"]]]:
        """Each write before the coda as it stands, one at a time: [batch, pos, d_model], a bias [d_model]."""
        for site, value in self._sites(coda=False):
            if site.layer is None or site.leaf != "attn.hook_z":
                yield Part(KINDS[site.leaf], site.loop, site.layer), value
                continue
            for head, weight in enumerate(self._output(site.layer).unbind(1)):
                yield Part("head", site.loop, site.layer, head), value[:, :, head] @ weight.T
            if (bias := self._bias(site.layer)) is not None:
                yield Part("attention bias", site.loop, site.layer), bias

    def _sites(self, coda: bool) -> Iterator[tuple[Site, Tensor]]:
        for name, value in self.kept.items():
            site = Site.parse(name)
            if coda or site.layer is None or self.m.cfg.segment(site.layer) != "coda":
                yield site, value

    def _output(self, layer: int) -> Float[Tensor, "d_model head d_head"]:
        if layer not in self.weights:
            weight = wide(self.m.model.output_weight(layer).detach())
            self.weights[layer] = weight.unflatten(1, (self.m.cfg.n_heads, -1))
        return self.weights[layer]

    def _bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        bias = wide(self.m.model.output_bias(layer).detach())
        return bias if bool(bias.any()) else None
