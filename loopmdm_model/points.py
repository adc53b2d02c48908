"""Hook points that grow with the loops, and the rules that reach the ones not born yet.

Each (loop, layer, site) has its own HookPoint. (One HookPoint that fires S times would keep the last
value and the first gradient under one name.) A HookPoint is called only if somebody listens.
"""

import difflib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from loopmdm_model import names
from loopmdm_model.config import LoopMDMConfig
from loopmdm_model.errors import UnknownNameError, UsageError
from loopmdm_model.taps import EXPLICIT_TAP, NO_TAP, Tap

if TYPE_CHECKING:
    from loopmdm_model.model import Context

AttnPath = Literal["auto", "eager", "sdpa"]
MOST_LOOPS = 512
"""Explicit names make their hook points at once; beyond this many loops that is surely a slip."""


class LoopPoint(HookPoint):
    """A HookPoint that knows its place from its name."""

    def layer(self) -> int:
        """The physical layer; in an unrolled model the depth."""
        found = re.search(r"blocks\.(\d+)\.", self.name or "")
        if found is None:
            raise UsageError(f"{self.name} belongs to no layer; names with blocks.<layer> do")
        return int(found.group(1))

    def loop(self) -> int | None:
        """The iteration, None outside the loop."""
        return names.parse_loop(self.name or "")


class HookTap(Tap):
    """Hands the activations of one layer application to its hook points."""

    __slots__ = ("listeners", "owner", "points")

    def __init__(self, owner: "LoopHooks"):
        self.owner, self.points = owner, {}
        self.listeners: list[dict] = []

    def add(self, leaf: str, point: HookPoint) -> None:
        """Take in the hook point of a leaf."""
        self.points[leaf] = point
        self.listeners += [point._forward_hooks, point._backward_hooks]

    @property
    def explicit(self) -> bool:
        """Whether the caller pinned the explicit attention path."""
        return self.owner.attn_path == "eager"

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Run the point's hooks if it has any; refuse a changed shape."""
        point = self.points[name]
        if not (point._forward_hooks or point._backward_hooks):
            return x
        self.owner.fired.add(point.name)
        out = point(x)
        if out.shape != x.shape:
            raise UsageError(
                f"a hook at {point.name} returned shape {list(out.shape)}, expected {list(x.shape)}; "
                "return a tensor of the same shape, or None"
            )
        return out

    def enter(self, context: "Context") -> None:
        """Keep the context for the hooks of this application."""
        self.owner.context = context

    def wants(self, *leaf_names: str) -> bool:
        """Whether a hook listens to one of these leaves."""
        for leaf in leaf_names:
            point = self.points[leaf]
            if point._forward_hooks or point._backward_hooks:
                if self.owner.attn_path == "sdpa" and leaf in names.EXPLICIT_ONLY:
                    raise UsageError(f'{point.name} does not exist on attn_path="sdpa"; use "auto" or "eager"')
                return True
        return False


class LoopHooks(HookedRootModule):
    """TransformerLens' hook calls over points named by `names.py`; HookedLoopMDM builds on it.

    While a hook runs, `context` tells what is running: `context.tokens`, `.masked` and `.real` [batch, pos] of the
    sequences that have not stopped.
    """

    context: "Context | None" = None

    def __init__(self, cfg: LoopMDMConfig):
        super().__init__()
        self.cfg = cfg
        self.mod_dict: dict[str, Any] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        self.attn_path: AttnPath = "auto"
        self.fired: set[str] = set()
        self._loops_run: int | None = None
        self._rules: list[tuple[Callable[[str], bool], dict[str, Any]]] = []
        self._taps: dict[str, HookTap] = {}
        self._add_points(names.outer_names(cfg))
        self.n_grown = 0
        self.grow(cfg.max_loops)

    def taps(self, prefix: str) -> Tap:
        """The tap of a layer application (a tap source for LoopMDM); a silent one where nobody listens."""
        tap = self._taps[prefix]
        if any(tap.listeners):
            return tap
        return EXPLICIT_TAP if self.attn_path == "eager" else NO_TAP

    @contextmanager
    def attention_path(self, attn_path: AttnPath) -> Iterator[None]:
        """Pin explicit ("eager") or fused ("sdpa") attention for all runs inside; "auto" leaves it as it is."""
        if attn_path not in ("auto", "eager", "sdpa"):
            raise UsageError(f'attn_path must be "auto", "eager" or "sdpa", got {attn_path!r}')
        before = self.attn_path
        self.attn_path = before if attn_path == "auto" else attn_path
        try:
            yield
        finally:
            self.attn_path = before

    def grow(self, n_loops: int) -> None:
        """Make the hook points of loops 0..n_loops - 1; standing rules apply to new ones too."""
        for loop in range(self.n_grown, n_loops):
            self._add_points(names.loop_names(self.cfg, loop))
        self.n_grown = max(self.n_grown, n_loops)

    def _add_points(self, new: list[str]) -> None:
        for name in new:
            point = LoopPoint()
            point.name = name
            self.hook_dict[name] = self.mod_dict[name] = point
            prefix, leaf = self._split(name)
            self._taps.setdefault(prefix, HookTap(self)).add(leaf, point)
            for matches, arguments in self._rules:
                if matches(name):
                    point.add_hook(**arguments)

    @staticmethod
    def _split(name: str) -> tuple[str, str]:
        head, mark, tail = name.partition("blocks.")
        if mark:
            layer, _, leaf = tail.partition(".")
            return f"{head}blocks.{layer}.", leaf
        loop = names.parse_loop(name)
        return ("", name) if loop is None else (f"loop.{loop}.", name.removeprefix(f"loop.{loop}."))

    def _known(self, name: str) -> str:
        """Check an explicit name and make its point if it belongs to a loop not grown yet."""
        names.check_name(self.cfg, name, self.n_grown)
        loop = names.parse_loop(name)
        if loop is not None and loop >= max(MOST_LOOPS, self.n_grown):
            raise UsageError(f"{name}: loop {loop} is beyond {MOST_LOOPS}; use a predicate to reach it")
        if loop is not None:
            self.grow(loop + 1)
        return name

    def _matcher(self, chosen: Callable[[str], bool]) -> Callable[[str], bool]:
        """The predicate itself, after making sure that it matches something."""
        if not any(chosen(name) for name in names.all_names(self.cfg, max(64, self.n_grown))):
            hint = _hint(chosen, names.all_names(self.cfg, 1))
            raise UnknownNameError(f"the filter matches no hook name; names look like {hint}")
        return chosen

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; a predicate also applies to loops that do not exist yet."""
        if isinstance(name, str):
            super().add_hook(self._known(name), hook, *args, **kwargs)
            return
        fields = ("dir", "is_permanent", "level", "prepend")
        self._add_rule(self._matcher(name), dict(zip(fields, args, strict=False)) | kwargs | {"hook": hook})

    def _enable_hook(self, name: str | Callable[[str], bool], hook: Callable, dir: Literal["fwd", "bwd"]) -> None:
        arguments = {"hook": hook, "dir": dir, "level": self.context_level}
        if isinstance(name, str):
            self.hook_dict[self._known(name)].add_hook(**arguments)
        else:
            self._add_rule(self._matcher(name), arguments)

    def _add_rule(self, matches: Callable[[str], bool], arguments: dict[str, Any]) -> None:
        self._rules.append((matches, arguments))
        for name, point in self.hook_dict.items():
            if matches(name):
                point.add_hook(**arguments)

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks and the standing rules behind them."""
        super().remove_all_hook_fns(direction, including_permanent, level)

        def stays(arguments: dict[str, Any]) -> bool:
            other = direction != "both" and arguments.get("dir", "fwd") != direction
            permanent = arguments.get("is_permanent", False) and not including_permanent
            return other or permanent or (level is not None and arguments.get("level") != level)

        self._rules = [rule for rule in self._rules if stays(rule[1])]

    @contextmanager
    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        fwd_hooks: list[tuple[Any, Callable]] | None = None,
        bwd_hooks: list[tuple[Any, Callable]] | None = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["LoopHooks"]:
        """Temporary hooks; warns at the end of those named explicitly that never fired."""
        fwd_hooks, bwd_hooks = list(fwd_hooks or []), list(bwd_hooks or [])
        for name, _ in fwd_hooks + bwd_hooks:  # refuse wrong names before adding anything
            self._known(name) if isinstance(name, str) else self._matcher(name)
        explicit = [name for name, _ in fwd_hooks if isinstance(name, str)]
        before, self.fired, self._loops_run = self.fired, set(), None
        try:
            with super().hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
                yield self
            self._warn_unfired(explicit)
        finally:
            self.fired = before | self.fired

    def _warn_unfired(self, explicit: list[str]) -> None:
        missing = [name for name in dict.fromkeys(explicit) if name not in self.fired]
        if missing and self._loops_run is not None:
            warnings.warn(
                f"never fired: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} "
                f"({self._loops_run} loops ran); raise n_loops or the rule's max_loops",
                stacklevel=4,
            )


def _hint(chosen: Callable[[str], bool], every: list[str]) -> str:
    words = [c for c in getattr(getattr(chosen, "__code__", None), "co_consts", ()) if isinstance(c, str)]
    near = [match for word in words for match in difflib.get_close_matches(word, every, n=2, cutoff=0.4)]
    return ", ".join(near or [every[1], every[-1]])
