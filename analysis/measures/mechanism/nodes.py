"""Nodes: activations of a looped model that can be patched, one at a time or several."""

from collections.abc import Iterable
from dataclasses import dataclass

from loopmdm.model.errors import UsageError, check_count, unknown_name
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.sites import Site

LEAVES = {
    "z": "attn.hook_z",
    "q": "attn.hook_rot_q",
    "k": "attn.hook_rot_k",
    "v": "attn.hook_v",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
BY_HEAD = ("z", "q", "k", "v")


@dataclass(frozen=True)
class Node:
    """An activation: `component` "z", "q", "k", "v" of a `head` (None: all), "attn_out", "mlp_out", or "state".

    `loop` is None in layers that do not loop. A state has no layer; H(-1) is the one before the first loop.
    `position`: one position alone; None: all.
    """

    component: str
    loop: int | None = None
    layer: int | None = None
    head: int | None = None
    position: int | None = None

    def __post_init__(self):
        """A known component; heads and layers only where there are any."""
        if not isinstance(self.component, str) or self.component not in (*LEAVES, "state"):
            raise unknown_name("component", self.component, (*LEAVES, "state"))
        if self.head is not None and self.component not in BY_HEAD:
            raise UsageError(f"{self.component} is of no head; leave head out, or take z")
        if (self.layer is None) != (self.component == "state"):
            raise UsageError(f"{self.component} needs {'loop, not layer' if self.layer is not None else 'layer='}")

    @property
    def site(self) -> Site:
        """Where it is."""
        if self.component != "state":
            return Site(self.loop, self.layer, LEAVES[self.component])
        assert self.loop is not None
        return Site(0, None, "hook_in") if self.loop < 0 else Site(self.loop, None, "hook_out")

    def check(self, m: HookedLoopMDM, n_loops: int, length: int) -> None:
        """UsageError unless such an activation exists in a run of `n_loops` loops on `length` tokens."""
        cfg = m.cfg
        if self.layer is not None and LEAVES[self.component] not in cfg.leaves:
            raise UsageError(f"this model offers no {LEAVES[self.component]}; patch another component")
        _inside("layer", self.layer, cfg.n_layers)
        _inside("head", self.head, cfg.n_heads)
        _inside("position", self.position, length)
        looped = self.layer is None or cfg.segment(self.layer) == "loop"
        if looped != (self.loop is not None):
            raise UsageError(f"layer {self.layer} {'loops: say in which loop' if looped else 'does not loop'}")
        if looped:
            check_count("loop", self.loop, least=-1 if self.layer is None else 0)
            _inside("loop", self.loop, n_loops)


def listed(nodes: Iterable[Node]) -> list[Node]:
    """Nodes, or one, as a list; UsageError for what is no node, or none."""
    found = list(nodes) if isinstance(nodes, Iterable) else [nodes]
    other = next((node for node in found or ["none"] if not isinstance(node, Node)), None)
    if other is not None:
        raise UsageError(f"nodes are several such as Node('z', loop=0, layer=1, head=0), got {other!r:.60}")
    return found


def _inside(what: str, number: int | None, size: int) -> None:
    if number is not None and (check_count(what, number, least=-1) >= size or (number < 0 and what != "loop")):
        raise UsageError(f"{what} {number} does not exist; there are {size} (0..{size - 1})")


def standard_nodes(
    m: HookedLoopMDM, n_loops: int, components: Iterable[str] = ("z", "attn_out", "mlp_out")
) -> list[Node]:
    """Of every layer application the named components, heads one by one; those that the model offers."""
    found = []
    places = [(None, layer) for layer in m.cfg.layers("prelude")]
    places += [(loop, layer) for loop in range(n_loops) for layer in m.cfg.layers("loop")]
    places += [(None, layer) for layer in m.cfg.layers("coda")]
    for loop, layer in places:
        for component in components:
            if component not in LEAVES:
                raise unknown_name("component", component, LEAVES)
            heads = range(m.cfg.n_heads) if component in BY_HEAD else [None]
            found += [Node(component, loop, layer, head) for head in heads if LEAVES[component] in m.cfg.leaves]
    return found
