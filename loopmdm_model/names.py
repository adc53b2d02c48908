"""Hook names: what exists, how short names resolve, and what shape each holds.

    hook_embed | blocks.{layer}.<leaf> for prelude and coda layers | ln_final.<leaf> | hook_logits
    loop.{i}.hook_in | loop.{i}.blocks.{layer}.<leaf> for looped layers | loop.{i}.hook_out

Leaves are TransformerLens'. `layer` is always the physical layer.
"""

import re

from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.errors import UsageError, check_count, unknown_name

LEAVES = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "attn.hook_result",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
HEAD_SPLIT = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z", "hook_result")
OUTER = ("hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "hook_logits")
EXPLICIT_ONLY = ("attn.hook_attn_scores", "attn.hook_pattern")
ON_DEMAND = ("attn.hook_result",)
"""Leaves so large that caching "everything" leaves them out; name them to get them."""


def leaves(cfg: LoopMDMConfig) -> tuple[str, ...]:
    """Leaf names of one layer application."""
    return tuple(leaf for leaf in LEAVES if leaf != "mlp.hook_pre_linear" or cfg.gated_mlp)


def loop_names(cfg: LoopMDMConfig, loop: int) -> list[str]:
    """All names of one loop iteration, in running order."""
    layers = [f"loop.{loop}.blocks.{layer}.{leaf}" for layer in cfg.layers("loop") for leaf in leaves(cfg)]
    return [f"loop.{loop}.hook_in", *layers, f"loop.{loop}.hook_out"]


def outer_names(cfg: LoopMDMConfig) -> list[str]:
    """All names outside the loop, in running order."""
    plain = {
        segment: [f"blocks.{layer}.{leaf}" for layer in cfg.layers(segment) for leaf in leaves(cfg)]
        for segment in ("prelude", "coda")
    }
    return [OUTER[0], *plain["prelude"], *plain["coda"], *OUTER[1:]]


def all_names(cfg: LoopMDMConfig, n_loops: int) -> list[str]:
    """Every name of a forward with `n_loops` loops."""
    return outer_names(cfg) + [name for loop in range(n_loops) for name in loop_names(cfg, loop)]


def parse_loop(name: str) -> int | None:
    """The iteration a name belongs to, None outside the loop."""
    match = re.match(r"loop\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def check_name(cfg: LoopMDMConfig, name: str, n_loops: int) -> str:
    """Return `name` if it exists for some number of loops, else raise with near matches."""
    loop = parse_loop(name)
    known = outer_names(cfg) if loop is None else loop_names(cfg, loop)
    if name in known:
        return name
    match = re.match(r"blocks\.(\d+)\.(.+)", name)
    if match and int(match.group(1)) in cfg.layers("loop"):
        raise unknown_name(
            "hook", name, [f"loop.0.{name}"], f"(layer {match.group(1)} is looped: give the iteration)"
        )
    raise unknown_name("hook", name, known if loop is not None else all_names(cfg, max(1, n_loops)))


def resolve(cfg: LoopMDMConfig, key: str | tuple, n_loops: int) -> str:
    """Full name of a key: a name, ("pattern", layer), or ("pattern", "loop", i, layer).

    A norm's leaf takes its norm last: ("scale", 0, "ln1"). Negative loops count from the last loop
    run, negative layers from the last layer.
    """
    if isinstance(key, str):
        return key if "hook_" in key else f"hook_{key}"
    if not isinstance(key, tuple) or not key or not isinstance(key[0], str):
        raise UsageError(f'{key!r} is no key; give a name, or a tuple such as ("pattern", "loop", 0, 1)')
    short, *place = key
    loop = None
    if place and place[0] == "loop":
        if len(place) < 2:
            raise UsageError(f'{key!r}: give the iteration, as in ("pattern", "loop", 0, 1)')
        loop = _wrap("loop", place[1], n_loops)
        place = place[2:]
    if not place:
        name = f"hook_{short.removeprefix('hook_')}"
        return f"loop.{loop}.{name}" if loop is not None else name
    layer = _wrap("layer", place[0], cfg.n_layers)
    prefix = f"loop.{loop}." if loop is not None else ""
    return f"{prefix}blocks.{layer}.{leaf(cfg, short, *place[1:])}"


def leaf(cfg: LoopMDMConfig, short: str, *within: str) -> str:
    """Full leaf name of a short one: "pattern" is attn.hook_pattern; ("scale", "ln1") is ln1.hook_scale."""
    wanted = f"hook_{short.removeprefix('hook_')}"
    found = [
        name
        for name in leaves(cfg)
        if name.rpartition(".")[2] == wanted and (not within or name.startswith(f"{within[0]}."))
    ]
    if short in leaves(cfg):
        return short
    if not found:
        shorts = [name.rpartition(".")[2].removeprefix("hook_") for name in leaves(cfg)]
        raise unknown_name("activation", short, dict.fromkeys(shorts))
    if len(found) > 1:
        raise UsageError(f'{short!r} exists in ln1 and ln2; add which, as in ("{short}", 0, "ln1")')
    return found[0]


def _wrap(kind: str, index: object, count: int) -> int:
    number = check_count(kind, index, least=-count)
    if number >= count:
        raise UnknownIndex(f"{kind} {number} does not exist; there are {count} (0..{count - 1})")
    return number % count


class UnknownIndex(UsageError, KeyError):
    """A loop or layer that does not exist."""

    def __str__(self) -> str:
        """The message itself."""
        return str(self.args[0])


def shape(cfg: LoopMDMConfig, name: str, batch: int, pos: int) -> tuple[int, ...]:
    """Shape of the activation `name` for `batch` sequences of `pos` tokens."""
    end = name.rpartition(".")[2]
    if end in ("hook_attn_scores", "hook_pattern"):
        return (batch, cfg.n_heads, pos, pos)
    if end == "hook_result":
        return (batch, pos, cfg.n_heads, cfg.d_model)
    if end in HEAD_SPLIT:
        return (batch, pos, cfg.n_heads, cfg.d_head)
    last = {"hook_scale": 1, "hook_logits": cfg.d_vocab}
    last |= dict.fromkeys(("hook_pre", "hook_pre_linear", "hook_post"), cfg.d_mlp)
    return (batch, pos, last.get(end, cfg.d_model))


def position_axis(name: str) -> int:
    """The axis of (query) positions, counted from the end."""
    return -3 if name.rpartition(".")[2] in HEAD_SPLIT else -2
