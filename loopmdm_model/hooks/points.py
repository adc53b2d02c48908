"""Hook points that grow with the loops.

Each (loop, layer, leaf) has its own HookPoint. (One HookPoint that fires S times would keep the last value and the
first gradient under one name.) A HookPoint is called only if somebody listens. Hooks put on the model itself
(`add_hook`, `reset_hooks_end=False`) are TransformerLens' and reach every call of every thread; those of a block
or of one call stand in `scopes.py`.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from loopmdm.model import sites
from loopmdm.model.context import Context
from loopmdm.model.errors import UnknownNameError, UsageError
from loopmdm.model.hooks.scopes import (
    RUNNING,
    AttnPath,
    Call,
    Hooks,
    Scope,
    SitePoint,
    check_path,
    open_scopes,
    warn_unfired,
)
from loopmdm.model.layout import Layout
from loopmdm.model.sites import Names, Site

MOST_LOOPS = 512
"""Explicit names make their hook points at once; beyond this many loops that is surely a slip."""
MATCHED_LOOPS = 64
"""Loops among whose names a filter has to match one, unless the model has run more."""


class LoopHooks(HookedRootModule):
    """TransformerLens' hook calls over points named by `sites.py`; HookedLoopMDM builds on it."""

    def __init__(self, cfg: Layout):
        super().__init__()
        self.cfg = cfg
        self.mod_dict: dict[str, Any] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        self._rules: list[tuple[Names, dict[str, Any]]] = []
        self._points: dict[str, dict[str, HookPoint]] = {}
        self._listeners: dict[str, list[dict]] = {}
        self._add_points(sites.outer_names(cfg))
        self.n_grown = 0
        self.grow(cfg.max_loops)

    # --- what the call that runs knows ---

    @property
    def call(self) -> Call:
        """The call whose hook is running, with its `notes`; UsageError outside hooks."""
        call = RUNNING.get()
        if call is None or call.owner is not self:
            raise UsageError("no hook of this model is running; a call's context exists inside its hooks only")
        return call

    @property
    def context(self) -> Context:
        """What is running, for hooks: `.tokens`, `.masked`, `.real` [batch, pos] of those not stopped yet."""
        context = self.call.context
        assert context is not None  # entered before any hook of an application runs
        return context

    @property
    def attn_path(self) -> AttnPath:
        """The attention path that a call made here would take: "auto", or the one that an open block pins."""
        return Call(self).path

    @contextmanager
    def attention_path(self, attn_path: AttnPath) -> Iterator[None]:
        """Pin explicit ("eager") or fused ("sdpa") attention for all runs inside; "auto" leaves it as it is."""
        with Scope(self, check_path(attn_path)).open():
            yield

    # --- points ---

    def points(self, prefix: str) -> dict[str, HookPoint]:
        """The points of an application by leaf; loops not grown yet are."""
        if prefix not in self._points:
            self.grow((Site.parse(f"{prefix}hook_in").loop or 0) + 1)
        return self._points[prefix]

    def hears(self, prefix: str) -> bool:
        """Whether a hook on the model itself listens to an application."""
        self.points(prefix)
        return any(self._listeners[prefix])

    def grow(self, n_loops: int) -> None:
        """Make the hook points of loops 0..n_loops - 1; standing rules apply to new ones too."""
        for loop in range(self.n_grown, n_loops):
            self._add_points(sites.loop_names(self.cfg, loop))
        self.n_grown = max(self.n_grown, n_loops)

    def _add_points(self, new: list[str]) -> None:
        for name in new:
            point = SitePoint()
            point.name = name
            self.hook_dict[name] = self.mod_dict[name] = point
            prefix, leaf = sites.split(name)
            self._points.setdefault(prefix, {})[leaf] = point
            self._listeners.setdefault(prefix, []).extend([point._forward_hooks, point._backward_hooks])
            for matches, arguments in self._rules:
                if matches(name):
                    point.add_hook(**arguments)

    def _known(self, name: str | Site) -> str:
        """Check an explicit name and make its point if it belongs to a loop not grown yet."""
        name = sites.check_name(self.cfg, str(name), self.n_grown)
        loop = Site.parse(name).loop
        if loop is not None and loop >= max(MOST_LOOPS, self.n_grown):
            raise UsageError(f"{name}: loop {loop} is beyond {MOST_LOOPS}; use a predicate to reach it")
        if loop is not None:
            self.grow(loop + 1)
        return name

    def _matcher(self, chosen: Names) -> Names:
        """The predicate itself, after making sure that it matches something."""
        n_loops = max(MATCHED_LOOPS, self.n_grown)
        if not any(map(chosen, sites.each_name(self.cfg, n_loops))):
            lost = [leaf for leaf in sites.LEAVES if leaf not in self.cfg.leaves and f"{leaf}'" in repr(chosen)]
            if lost:
                raise UnknownNameError(
                    f"this model offers no {', '.join(lost)}; it has {', '.join(self.cfg.leaves)}"
                )
            hint = _hint(chosen, sites.all_names(self.cfg, 1))
            places = f"loops 0..{n_loops - 1}, layers 0..{self.cfg.n_layers - 1}"
            raise UnknownNameError(f"the filter matches no hook name ({places}); names look like {hint}")
        return chosen

    def _checked(self, hooks: Hooks | None) -> list[tuple[Any, Callable]]:
        """Hooks with their names known, or UsageError before anything is added; a list of names is a hook each."""
        found: Hooks = []
        if isinstance(hooks, str | bytes) or not isinstance(hooks, Iterable | None):
            raise UsageError(f"hooks are a list of pairs of a name or filter and a function, got {hooks!r:.60}")
        for pair in () if hooks is None else hooks:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
                raise UsageError(f"hooks are pairs of a name or filter and a function, got {pair!r:.60}")
            name, hook = pair
            if callable(name):
                found.append((self._matcher(name), hook))  # pyright: ignore[reportArgumentType]
                continue
            listed = list(name) if isinstance(name, list | tuple | set) else [name]
            found += [(self._known(each), hook) for each in listed]
        return found

    # --- hooks on the model itself ---

    def add_hook(self, name: Any, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; takes several names, too; a predicate also applies to loops not made yet."""
        fields = ("dir", "is_permanent", "level", "prepend")
        arguments: dict[str, Any] = dict(zip(fields, args, strict=False)) | kwargs | {"hook": hook}
        for place, _ in self._checked([(name, hook)]):
            if isinstance(place, str):
                self.hook_dict[place].add_hook(**arguments)
            else:
                self._add_rule(place, arguments)

    def _add_rule(self, matches: Names, arguments: dict[str, Any]) -> None:
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
        """Remove hooks and the standing rules behind them, and those of the blocks that are open here."""
        super().remove_all_hook_fns(direction, including_permanent, level)

        def stays(arguments: dict[str, Any]) -> bool:
            other = direction != "both" and arguments.get("dir", "fwd") != direction
            permanent = arguments.get("is_permanent", False) and not including_permanent
            return other or permanent or (level is not None and arguments.get("level") != level)

        self._rules = [rule for rule in self._rules if stays(rule[1])]
        for scope in open_scopes(self) if level is None else ():
            scope.clear(direction)

    # --- hooks of a block ---

    @contextmanager
    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        fwd_hooks: Hooks | None = None,
        bwd_hooks: Hooks | None = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["LoopHooks"]:
        """Hooks of the calls made inside; warns at the end of those named explicitly that never fired.

        With `reset_hooks_end` False they are put on the model itself, and stay.
        """
        forward, backward = self._checked(fwd_hooks), self._checked(bwd_hooks)
        if not reset_hooks_end:
            for direction, listed in (("fwd", forward), ("bwd", backward)):
                for name, hook in listed:
                    self.add_hook(name, hook, direction)
            yield self
            return
        scope = Scope(self, forward=forward, backward=backward)
        try:
            with scope.open():
                yield self
            warn_unfired([name for name, _ in forward if isinstance(name, str)], scope)
        finally:
            if clear_contexts:
                self.clear_contexts()


def _hint(chosen: Names, every: list[str]) -> str:
    if isinstance(chosen, sites.Filter):
        return f"{every[1]}; the filter is {chosen!r}"
    words = [c for c in getattr(getattr(chosen, "__code__", None), "co_consts", ()) if isinstance(c, str)]
    near = [match for word in words for match in difflib.get_close_matches(word, every, n=2, cutoff=0.4)]
    return ", ".join(near or [every[1], every[-1]])
