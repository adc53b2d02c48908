"""ForeignLayout: sizes and costs of somebody else's model, read from its config and its weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loopmdm.model.adapters.families import Family, at, number
from loopmdm.model.adapters.kinds import checked_loop
from loopmdm.model.adapters.listening import leaves
from loopmdm.model.errors import UsageError, check_count, check_keys
from loopmdm.model.layout import Facts, Layout

NAMES: dict[str, Sequence[str]] = {
    "d_vocab": ("vocab_size",),
    "n_ctx": ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx", "seq_len"),
    "d_model": ("hidden_size", "d_model", "n_embd"),
    "n_heads": ("num_attention_heads", "n_heads", "n_head", "num_heads"),
    "n_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "d_head": ("head_dim",),
    "d_mlp": ("intermediate_size", "mlp_hidden_size"),
    "n_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "n_chosen": ("num_experts_per_tok", "moe_topk"),
    "native_loops": (),
}
"""Where configs keep a size, usual names first."""


@dataclass(frozen=True, kw_only=True)
class ForeignLayout(Layout):
    """Sizes of somebody else's model, and its layers as prelude, loop and coda.

    `native_loops`: how often its own forward runs the looped layers. `layer_products` and `head_products`: weights
    that one token meets in a layer (on average over layers; of experts those that it is sent to) and in the head.
    """

    d_vocab: int
    n_ctx: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    n_prelude_layers: int
    n_loop_layers: int
    n_coda_layers: int
    max_loops: int
    native_loops: int
    mask_token_id: int | None
    leaves: tuple[str, ...]
    outer_leaves: tuple[str, ...]
    kind: Facts
    layer_products: int
    head_products: int

    @property
    def facts(self) -> Facts:
        """What kind of model it is."""
        return self.kind

    def layer_flops(self, length: int, moving: Any = None) -> Any:
        """FLOPs of one layer on one sequence, as `Layout.layer_flops` counts them.

        Windows count as full attention; what a cycle adds between loops (an injection's product) counts nothing.
        """
        moving = length if moving is None else moving
        keys_values = 2 * self.d_model * self.n_kv_heads * self.d_head
        attention = 2 * 2 * length * self.n_heads * self.d_head
        return 2 * keys_values * length + moving * (2 * (self.layer_products - keys_values) + attention)

    def unembedding_flops(self, n_rows: Any) -> Any:
        """FLOPs of the logits of `n_rows` positions, what the head does before them included."""
        return n_rows * 2 * self.head_products


def read_layout(
    native: nn.Module,
    family: Family,
    mask_token_id: int | None,
    loop: tuple[int, int] | None,
    max_loops: int | None,
) -> ForeignLayout:
    """The layout of `native` with layers first .. first + n - 1 looped, by default those that it loops itself.

    A model that loops nothing is all prelude; its hooks have TransformerLens' plain names.
    """
    loop = checked_loop(loop)
    sizes = _sizes(getattr(native, "config", None), family)
    blocks = family.find_blocks(native)
    own = _own_loop(native, family, len(blocks))
    first, looped = next((said for said in (loop, own) if said is not None), (len(blocks), 0))
    native_loops = sizes["native_loops"] if own == (first, looped) else 1
    return ForeignLayout(
        **{
            name: sizes[name]
            for name in ("d_vocab", "n_ctx", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp")
        },
        **_segments(len(blocks), first, looped),
        max_loops=check_count("max_loops", native_loops if max_loops is None else max_loops),
        native_loops=native_loops,
        mask_token_id=mask_token_id,
        leaves=leaves(family),
        outer_leaves=("hook_embed", "hook_logits"),
        kind=family.facts(mask_token_id),
        layer_products=round(sum(_products(block, family, sizes) for block in blocks) / len(blocks)),
        head_products=_head_products(native, family) or sizes["d_model"] * sizes["d_vocab"],
    )


def _segments(n_layers: int, first: int, looped: int) -> dict[str, int]:
    if n_layers < first + looped:
        raise UsageError(f"loop=({first}, {looped}) does not fit into the {n_layers} layers there are")
    return {"n_prelude_layers": first, "n_loop_layers": looped, "n_coda_layers": n_layers - first - looped}


def _own_loop(native: nn.Module, family: Family, n_layers: int) -> tuple[int, int] | None:
    if family.loop is None:
        return None
    first, looped = family.loop
    first = number(native, first)
    return first, n_layers - first if looped is None else number(native, looped)


def _sizes(config: Any, family: Family) -> dict[str, int]:
    check_keys(family.sizes, NAMES, "sizes")
    least = {"n_experts": 0, "n_chosen": 0, "d_mlp": 0}
    found = {name: _size(config, family, name) for name in NAMES}
    for name, value in found.items():
        found[name] = None if value is None else check_count(f"sizes.{name}", value, least.get(name, 1))
    for name in ("d_vocab", "d_model", "n_heads"):
        if found[name] is None:
            raise UsageError(
                f"the config ({type(config).__name__}) has none of {', '.join(NAMES[name])}; "
                f'give sizes={{"{name}": ..}}, a number or the name it has there'
            )
    defaults = {"n_kv_heads": found["n_heads"], "d_head": found["d_model"] // found["n_heads"], "native_loops": 1}
    defaults |= {"d_mlp": 4 * found["d_model"], "n_ctx": 2**20, "n_experts": 0, "n_chosen": 0}
    return {name: defaults[name] if value is None else value for name, value in found.items()}


def _size(config: Any, family: Family, name: str) -> Any:
    """A size by the family's word for it, else by the usual ones; None if there is none."""
    written = family.sizes.get(name)
    if callable(written):
        return written(config)
    if isinstance(written, int):
        return written
    for word in [written] if written else NAMES[name]:
        value = getattr(config, word, None)
        if value is not None:
            return value
    return None


def _products(block: nn.Module, family: Family, sizes: dict[str, int]) -> float:
    """Weights of a block that one token meets."""
    total = 0.0
    for name, parameter in block.named_parameters():
        if parameter.ndim < 2 or name.startswith(tuple(f"{part}." for part in family.once)):
            continue
        routed = ".experts." in f".{name}"
        if routed and not 0 < sizes["n_chosen"] <= sizes["n_experts"]:
            raise UsageError(
                f"{type(block).__name__} has experts, but the config says not of how many it meets how many; "
                'give sizes={"n_experts": .., "n_chosen": ..}'
            )
        total += math.prod(parameter.shape) * (sizes["n_chosen"] / sizes["n_experts"] if routed else 1)
    return total


def _head_products(native: nn.Module, family: Family) -> int:
    steps = [at(native, step, "head") for step in family.head if isinstance(step, str)]
    return sum(weight.numel() for step in steps for weight in step.parameters() if weight.ndim >= 2)
