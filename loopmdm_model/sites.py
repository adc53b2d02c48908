"""Sites: the places in a forward where activations are offered, their names, and filters over them.

    hook_embed | blocks.{layer}.<leaf> for prelude and coda layers | ln_final.<leaf> | hook_logits
    loop.{i}.hook_in | loop.{i}.blocks.{layer}.<leaf> for looped layers | loop.{i}.hook_out

Leaves are TransformerLens'. `layer` is always the physical layer. A `Site` is one such place as a value,
`at(loop=.., layer=.., leaf=..)` a filter over their names that prints as it was written.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from types import EllipsisType
from typing import Any

from loopmdm.model.errors import UsageError, check_count, unknown_name
from loopmdm.model.layout import Layout

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
"""Leaf names of a layer application, in running order; a model offers those that its layout lists."""

HEAD_SPLIT = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z", "hook_result")
OUTER = ("hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "hook_logits")
EXPLICIT_ONLY = ("attn.hook_attn_scores", "attn.hook_pattern")
ON_DEMAND = ("attn.hook_result",)
"""Leaves so large that caching "everything" leaves them out; name them to get them."""

_GRAMMAR = re.compile(r"(?:loop\.(?P<loop>\d+)\.)?(?:blocks\.(?P<layer>\d+)\.)?(?P<leaf>[^.].*)")


@dataclass(frozen=True)
class Site:
    """One place: the iteration (None outside the loop), the physical layer (None outside layers), the leaf.

    `str(site)` is its hook name. A leaf may be short where it is unambiguous: Site(2, 1, "pattern").
    """

    loop: int | None
    layer: int | None
    leaf: str

    def __post_init__(self):
        """Counts from 0; short leaves become full ones."""
        for name in ("loop", "layer"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        if not isinstance(self.leaf, str):
            raise UsageError(f"leaf must be a name, such as pattern, got {self.leaf!r:.60}")
        if self.layer is not None and "hook_" not in self.leaf:
            object.__setattr__(self, "leaf", full_leaf(self.leaf))

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site of a hook name; UsageError for what is none."""
        found = _parsed(name) if isinstance(name, str) else None
        if found is None:
            raise UsageError(f"{name!r} is no hook name; names look like loop.2.blocks.1.attn.hook_pattern")
        return found

    @property
    def prefix(self) -> str:
        """The hook name without the leaf, as in "loop.2.blocks.1."."""
        loop = "" if self.loop is None else f"loop.{self.loop}."
        return loop if self.layer is None else f"{loop}blocks.{self.layer}."

    def __str__(self) -> str:
        """The hook name."""
        return f"{self.prefix}{self.leaf}"

    def at(self, leaf: str) -> "Site":
        """Another leaf of the same application."""
        return replace(self, leaf=leaf)


@lru_cache(maxsize=2**16)
def _parsed(name: str) -> Site | None:
    """The site of a name, None if it is none; the same names are met at every run."""
    match = _GRAMMAR.fullmatch(name)
    if match is None or "hook_" not in match["leaf"] or match["leaf"].startswith(("loop.", "blocks.")):
        return None
    loop, layer = (None if match[part] is None else int(match[part]) for part in ("loop", "layer"))
    return Site(loop, layer, match["leaf"])


ALIASES = {"attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v"}
ALIASES |= {"mlp_pre": "pre", "mlp_post": "post"}
"""Other short names that TransformerLens takes."""


def full_leaf(short: str, among: Iterable[str] = LEAVES, within: str = "") -> str:
    """Full leaf name of a short one: "pattern" is attn.hook_pattern; within="ln1", "scale" is ln1.hook_scale."""
    among = tuple(among)
    if short in among:
        return short
    wanted = f"hook_{ALIASES.get(short, short).removeprefix('hook_')}"
    found = [leaf for leaf in among if leaf.rpartition(".")[2] == wanted and leaf.startswith(within)]
    if not found:
        shorts = [leaf.rpartition(".")[2].removeprefix("hook_") for leaf in among]
        raise unknown_name("activation", short, dict.fromkeys(shorts))
    if len(found) > 1:
        raise UsageError(f'{short!r} exists in ln1 and ln2; add which, as in ("{short}", 0, "ln1")')
    return found[0]


# --- filters ---

Numbers = int | slice | Iterable[int] | None | EllipsisType


class Filter:
    """A filter over hook names: called with one, it says whether it is meant. `|`, `&` and `~` combine."""

    def __call__(self, name: str) -> bool:
        """Whether the site of that name is meant; no hook name never is."""
        site = _parsed(name)
        return site is not None and self.holds(site)

    def holds(self, site: Site) -> bool:
        """Whether `site` is meant."""
        raise NotImplementedError

    def __or__(self, other: "Filter") -> "Filter":
        """Either."""
        return _Any((self, other))

    def __and__(self, other: "Filter") -> "Filter":
        """Both."""
        return _All((self, other))

    def __invert__(self) -> "Filter":
        """Not this one."""
        return _Not(self)


@dataclass(frozen=True, repr=False)
class At(Filter):
    """Made by `at`: every field is `...` (any), None (there is none) or a set of values."""

    loop: Any = ...
    layer: Any = ...
    leaf: Any = ...

    def holds(self, site: Site) -> bool:
        """Whether all fields agree."""
        return (
            _agrees(self.loop, site.loop)
            and _agrees(self.layer, site.layer)
            and (self.leaf is ... or site.leaf in self.leaf)
        )

    def __repr__(self) -> str:
        """As it was written."""
        given = {"loop": self.loop, "layer": self.layer, "leaf": self.leaf}
        parts = [f"{name}={_written(value)}" for name, value in given.items() if value is not ...]
        return f"at({', '.join(parts)})"


def at(*, loop: Numbers = ..., layer: Numbers = ..., leaf: str | Iterable[str] | EllipsisType = ...) -> At:
    """The sites at some loops, layers and leaves; what is left out is any.

    `loop` and `layer`: a number, a slice such as slice(2, None), several numbers, or None for sites outside the
    loop or outside layers. `leaf`: a full or short name, or several.

        m.run_with_cache(tokens, names_filter=at(loop=slice(2, None), leaf="pattern"))

    >>> patterns = lm.at(loop=slice(2, None), leaf="pattern")
    >>> _, cache = m.run_with_cache(b, n_loops=4, names_filter=patterns)
    >>> list(cache)
    ['loop.2.blocks.1.attn.hook_pattern', 'loop.3.blocks.1.attn.hook_pattern']
    """
    return At(_numbers("loop", loop), _numbers("layer", layer), _leaves(leaf))


@dataclass(frozen=True, repr=False)
class _Span:
    """The numbers of a slice that counts from the front."""

    start: int
    stop: int | None
    step: int

    def __contains__(self, number: int) -> bool:
        inside = number >= self.start and (self.stop is None or number < self.stop)
        return inside and (number - self.start) % self.step == 0

    def __repr__(self) -> str:
        return f"slice({self.start}, {self.stop}{'' if self.step == 1 else f', {self.step}'})"


def _numbers(what: str, given: Numbers) -> Any:
    if given is None or given is ...:
        return given
    if isinstance(given, slice):
        start, step = given.start or 0, given.step or 1
        if start < 0 or (given.stop is not None and given.stop < 0) or step < 1:
            raise UsageError(f"{what}s are counted from 0, from the front; got {given}")
        return _Span(start, given.stop, step)
    try:
        listed = frozenset([given] if isinstance(given, int) else given)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise UsageError(f"{what} must be a number, several, a slice or None, got {given!r}") from None
    if not listed:
        raise UsageError(f"{what}s is empty; name at least one, or leave it out for all")
    return frozenset(check_count(f"{what}s", number, least=0) for number in listed)


def _leaves(given: str | Iterable[str] | EllipsisType) -> Any:
    if given is ...:
        return given
    listed = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(leaf, str) for leaf in listed):
        raise UsageError(f"leaf must be a name or several, such as pattern, got {given!r:.60}")
    if not listed:
        raise UsageError("leaf is empty; name at least one, or leave it out for all")
    outside = ("hook_in", "hook_out", *OUTER)
    return tuple(leaf if leaf in outside else full_leaf(leaf) for leaf in listed)


def _agrees(wanted: Any, value: int | None) -> bool:
    if wanted is ...:
        return True
    return value is None if wanted is None else value is not None and value in wanted


def _written(value: Any) -> str:
    if isinstance(value, frozenset):
        numbers = sorted(value)
        return repr(numbers[0] if len(numbers) == 1 else numbers)
    if isinstance(value, tuple):
        return repr(value[0] if len(value) == 1 else list(value))
    return repr(value)


@dataclass(frozen=True, repr=False)
class _Any(Filter):
    parts: tuple[Filter, ...]

    def holds(self, site: Site) -> bool:
        return any(part.holds(site) for part in self.parts)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))


@dataclass(frozen=True, repr=False)
class _All(Filter):
    parts: tuple[Filter, ...]

    def holds(self, site: Site) -> bool:
        return all(part.holds(site) for part in self.parts)

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, _Any) else repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class _Not(Filter):
    part: Filter

    def holds(self, site: Site) -> bool:
        return not self.part.holds(site)

    def __repr__(self) -> str:
        return f"~{self.part!r}" if isinstance(self.part, At) else f"~({self.part!r})"


# --- what exists in a model ---


def loop_names(cfg: Layout, loop: int) -> list[str]:
    """All names of one loop iteration, in running order."""
    layers = [f"loop.{loop}.blocks.{layer}.{leaf}" for layer in cfg.layers("loop") for leaf in cfg.leaves]
    return [f"loop.{loop}.hook_in", *layers, f"loop.{loop}.hook_out"]


def outer_names(cfg: Layout) -> list[str]:
    """All names outside the loop, in running order."""
    plain = {
        segment: [f"blocks.{layer}.{leaf}" for layer in cfg.layers(segment) for leaf in cfg.leaves]
        for segment in ("prelude", "coda")
    }
    first, *last = cfg.outer_leaves
    return [first, *plain["prelude"], *plain["coda"], *last]


def all_names(cfg: Layout, n_loops: int) -> list[str]:
    """Every name of a forward with `n_loops` loops."""
    return list(each_name(cfg, n_loops))


def each_name(cfg: Layout, n_loops: int) -> Iterator[str]:
    """As `all_names`, one at a time."""
    yield from outer_names(cfg)
    for loop in range(n_loops):
        yield from loop_names(cfg, loop)


def applications(cfg: Layout, n_loops: int) -> list[tuple[str, int]]:
    """(prefix of the hook names, physical layer) of every layer application, in running order."""
    looped = [(f"loop.{i}.blocks.{layer}.", layer) for i in range(n_loops) for layer in cfg.layers("loop")]
    prelude = [(f"blocks.{layer}.", layer) for layer in cfg.layers("prelude")]
    return prelude + looped + [(f"blocks.{layer}.", layer) for layer in cfg.layers("coda")]


def split(name: str) -> tuple[str, str]:
    """Prefix of the application and leaf of a hook name; outside layers the loop's or no prefix."""
    site = Site.parse(name)
    return site.prefix, site.leaf


def check_name(cfg: Layout, name: str, n_loops: int) -> str:
    """Return `name` if it exists for some number of loops, else raise with near matches."""
    match = _GRAMMAR.fullmatch(name)
    loop = None if match is None or match["loop"] is None else int(match["loop"])
    known = outer_names(cfg) if loop is None else loop_names(cfg, loop)
    if name in known:
        return name
    if loop is None and match and match["layer"] and int(match["layer"]) in cfg.layers("loop"):
        remedy = f"(layer {match['layer']} is looped: give the iteration)"
        raise unknown_name("hook", name, [f"loop.0.{name}"], remedy)
    raise unknown_name("hook", name, known if loop is not None else all_names(cfg, max(1, n_loops)))


def resolve(cfg: Layout, key: "str | tuple | Site", n_loops: int) -> str:
    """Full name of a key: a name, a Site, ("pattern", layer), or ("pattern", "loop", i, layer).

    A norm's leaf takes its norm last: ("scale", 0, "ln1"). Negative loops count from the last loop
    run, negative layers from the last layer.
    """
    if isinstance(key, Site):
        return str(key)
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
        return str(Site(loop, None, f"hook_{short.removeprefix('hook_')}"))
    layer = _wrap("layer", place[0], cfg.n_layers)
    if len(place) > 2 or any(not isinstance(word, str) for word in place[1:]):
        raise UsageError(f'{key!r} is no key; a looped layer is ("{short}", "loop", i, {layer})')
    within = f"{place[1]}." if len(place) > 1 else ""
    return str(Site(loop, layer, full_leaf(short, cfg.leaves, within)))


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


def shape(cfg: Layout, name: str, batch: int, pos: int) -> tuple[int, ...]:
    """Shape of the activation `name` for `batch` sequences of `pos` tokens."""
    end = name.rpartition(".")[2]
    if end in ("hook_attn_scores", "hook_pattern"):
        return (batch, cfg.n_heads, pos, pos)
    if end == "hook_result":
        return (batch, pos, cfg.n_heads, cfg.d_model)
    if end in HEAD_SPLIT:
        heads = cfg.n_kv_heads or cfg.n_heads if end == "hook_k" else cfg.n_heads
        return (batch, pos, heads, cfg.d_head)
    last = {"hook_scale": 1, "hook_logits": cfg.d_vocab}
    last |= dict.fromkeys(("hook_pre", "hook_pre_linear", "hook_post"), cfg.d_mlp)
    return (batch, pos, last.get(end, cfg.d_model))


def position_axis(name: str) -> int:
    """The axis of (query) positions, counted from the end."""
    return -3 if name.rpartition(".")[2] in HEAD_SPLIT else -2


Names = Callable[[str], bool]
"""A predicate over hook names; a `Filter` is one."""


def listing(cfg: Layout, n_loops: int, batch: int, pos: int) -> str:
    """Every name and its shape on `batch` sequences of `pos` tokens, a line each: a map, weights or none."""
    names = all_names(cfg, n_loops)
    width = max(len(name) for name in names)
    return "\n".join(f"{name:{width}}  {list(shape(cfg, name, batch, pos))}" for name in names)
