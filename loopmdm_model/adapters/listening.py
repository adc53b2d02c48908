"""What is heard inside one application of a native block, and where: leaves by the parts of a block.

attn_out   hook_attn_out (what it gives), attn.hook_result (by head, before the sum)
mlp        hook_mlp_out            q, k   attn.hook_q, attn.hook_k (projections, before any norm or rotation)
ln1, ln2   ln1/ln2.hook_normalized; what ln2 sees is hook_resid_mid in pre-norm families
attn       the leaves of `attention.LEAVES`
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loopmdm.model import sites
from loopmdm.model.adapters.attention import LEAVES as ATTENTION
from loopmdm.model.adapters.attention import AttentionEar
from loopmdm.model.adapters.detours import Detour, Route, aside
from loopmdm.model.adapters.families import Family
from loopmdm.model.errors import UsageError
from loopmdm.model.layout import Layout
from loopmdm.model.taps import Tap

BY_PART = {
    "attn_out": ("attn.hook_result", "hook_attn_out"),
    "mlp": ("hook_mlp_out",),
    "q": ("attn.hook_q",),
    "k": ("attn.hook_k",),
    "ln1": ("ln1.hook_normalized",),
    "ln2": ("hook_resid_mid", "ln2.hook_normalized"),
}
"""Leaves that a part of a block gives."""


def leaves(family: Family) -> tuple[str, ...]:
    """What a family offers in a layer application, in running order."""
    offered = {"hook_resid_pre", "hook_resid_post", *(ATTENTION if family.hears else ())}
    for part, names in BY_PART.items():
        if part in family.parts and (family.pre_norm or not part.startswith("ln")):
            offered |= set(names)
    return tuple(leaf for leaf in sites.LEAVES if leaf in offered)


@contextmanager
def listening(family: Family, cfg: Layout, block: nn.Module, tap: Tap, held: Tensor | None) -> Iterator[None]:
    """Let `tap` hear one application of `block`, made inside, as far as it wants to."""

    def offer(leaf: str, x: Tensor) -> Tensor:
        with aside():
            return tap(leaf, x)

    routes: dict[nn.Module, Route] = {}
    for part, names in BY_PART.items():
        wanted = [leaf for leaf in names if leaf in cfg.leaves and tap.wants(leaf)]
        if wanted:
            routes[family.part(block, part)] = _route(cfg, family.part(block, part), wanted, offer, held)
    detour = Detour(routes)
    if not family.hears or not (tap.explicit or tap.wants(*ATTENTION) or tap.attend is not None):
        with detour.open():
            yield
        return
    explicit = tap.explicit or tap.wants(*sites.EXPLICIT_ONLY)
    instead = None if tap.attend is None else aside()(tap.attend)
    ear = AttentionEar(offer, cfg.n_heads, explicit, lambda: detour.in_force, instead)
    if family.parts.get("attn"):
        detour.routes[family.part(block, "attn")] = _within(ear)
        with detour.open():
            yield
    else:
        with detour.open(), ear:
            yield
    if not ear.heard:
        raise UsageError(
            f"{type(block).__name__} made no call of scaled_dot_product_attention, so its attention is not heard; "
            "load the model with attn_implementation='sdpa', or without patterns: hears=False"
        )


def _within(ear: AttentionEar) -> Route:
    def route(native: Callable, *args: Any, **kwargs: Any) -> Any:
        with ear:
            return native(*args, **kwargs)

    return route


def _route(cfg: Layout, module: nn.Module, wanted: list[str], offer: Callable, held: Tensor | None) -> Route:
    """The route of a part's calls: its input or output offered as each of the `wanted` leaves says."""

    def route(native: Callable, *args: Any, **kwargs: Any) -> Any:
        x, *others = args or (
            kwargs.pop(next(iter(kwargs))),
        )  # parts take one tensor first, sometimes by its name
        if "hook_resid_mid" in wanted:
            x = offer("hook_resid_mid", x.clone())  # its own: the block adds to x itself
        if "attn.hook_result" in wanted:
            out = _summed(module, x, cfg.n_heads, offer)
        else:
            out = native(x, *others, **kwargs)
        value, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        for leaf in wanted:
            if leaf not in ("hook_resid_mid", "attn.hook_result"):
                value = _offered(leaf, value, cfg, offer, held)
        return (value, *rest) if isinstance(out, tuple) else value

    return route


def _offered(leaf: str, value: Tensor, cfg: Layout, offer: Callable, held: Tensor | None) -> Tensor:
    if leaf in ("attn.hook_q", "attn.hook_k"):
        return offer(leaf, value.unflatten(-1, (-1, cfg.d_head))).flatten(-2)
    if held is not None and leaf in ("hook_attn_out", "hook_mlp_out"):  # nothing is added where tokens are held
        value = value.masked_fill(held[..., None], 0.0)
    return offer(leaf, value)


def _summed(module: nn.Module, z: Tensor, n_heads: int, offer: Callable) -> Tensor:
    """The output projection head by head, [batch, pos, head, d_model], offered and summed."""
    weight = out_weight(module).unflatten(1, (n_heads, -1))
    by_head = torch.einsum("...hd,mhd->...hm", z.unflatten(-1, (n_heads, -1)), weight)
    total = offer("attn.hook_result", by_head).sum(-2)
    bias = getattr(module, "bias", None)
    return total if bias is None else total + bias


def out_weight(module: nn.Module) -> Tensor:
    """A projection's weight as [out, in]; GPT-2's Conv1D keeps it the other way round."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UsageError(f"{type(module).__name__} keeps no plain weight [out, in]; load it without quantisation")
    return weight.T if type(module).__name__ == "Conv1D" else weight
