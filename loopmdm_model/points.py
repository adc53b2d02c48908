"""Hook points that grow with the loops, and what belongs to one call: its path, its listeners, what fired.

Each (loop, layer, leaf) has its own HookPoint. (One HookPoint that fires S times would keep the last value and the
first gradient under one name.) A HookPoint is called only if somebody listens.

Hooks of a `with` block or of one call live in a `Scope` of their own, not on the model: they reach the calls made
inside that block, in the thread that opened it. A block opened inside a generator reaches what that generator
calls while it runs, and nothing while it is suspended. Hooks put on the model itself (`add_hook`,
`reset_hooks_end=False`) are TransformerLens' and reach every call of every thread.
"""

import difflib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Literal, cast

from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from loopmdm_model import sites
from loopmdm_model.context import Context
from loopmdm_model.errors import UnknownNameError, UsageError
from loopmdm_model.layout import Layout
from loopmdm_model.sites import Names, Site
from loopmdm_model.taps import EXPLICIT_TAP, NO_TAP, Tap

AttnPath = Literal["auto", "eager", "sdpa"]
MOST_LOOPS = 512
"""Explicit names make their hook points at once; beyond this many loops that is surely a slip."""

Hooks = list[tuple[Any, Callable]]
_OPEN: ContextVar[tuple["Scope", ...]] = ContextVar("open scopes", default=())
_RUNNING: ContextVar["Call | None"] = ContextVar("call whose hook runs", default=None)


class SitePoint(HookPoint):
    """A HookPoint that knows its iteration; `layer()` is the physical layer."""

    def layer(self) -> int:
        """The physical layer."""
        layer = self._site().layer
        if layer is None:
            raise UsageError(f"{self.name} belongs to no layer")
        return layer

    def loop(self) -> int | None:
        """The iteration; None outside the loop."""
        return self._site().loop

    def _site(self) -> Site:
        assert self.name is not None
        return Site.parse(self.name)


Rule = tuple[Names, Callable, str]
SHARED = ("hook_embed", "hook_in", "hook_out", "hook_resid_pre", "hook_resid_post")
"""Leaves whose tensor goes by other names, too, or is remembered as a state."""


def own_copy(point: HookPoint, x: Tensor) -> Tensor:
    """What a hook may write into: a copy where the tensor goes by other names, so that only this site changes."""
    return x.clone() if (point.name or "").endswith(SHARED) else x


class Listener:
    """A scope's hooks at one site: forward ones are called, backward ones hang on a point of their own."""

    __slots__ = ("backward", "forward", "point")

    def __init__(self, point: HookPoint, forward: list[Callable], backward: list[Callable]):
        self.point, self.forward, self.backward = point, forward, None
        if backward:
            self.backward = SitePoint()
            self.backward.name, self.backward.ctx = point.name, point.ctx
            for hook in backward:
                self.backward.add_hook(hook, dir="bwd")

    @classmethod
    def of(cls, point: HookPoint, rules: list[Rule]) -> "Listener | None":
        """The listener of those rules that mean this point; None if none does."""
        meant = [(hook, direction) for matches, hook, direction in rules if matches(point.name)]  # pyright: ignore
        sides = [[hook for hook, direction in meant if direction == side] for side in ("fwd", "bwd")]
        return cls(point, *sides) if meant else None

    def __call__(self, x: Tensor) -> Tensor:
        """Run the hooks as a HookPoint would."""
        for hook in self.forward:
            reads = getattr(hook, "reads_only", False)
            given = x if reads else own_copy(self.point, x)
            out = hook(given, hook=self.point)
            x = out if out is not None else x if reads else given
        return x if self.backward is None else self.backward(x)


class Scope:
    """What holds inside one `with` block, or for one call: hooks, or a pinned attention path.

    `fired` names the points whose hooks ran, `loops_run` the most loops of a call inside. `frame` is the generator
    that opened it, if one did; `missed` counts the calls made while that was suspended, `reached` says whether any
    was reached.
    """

    def __init__(
        self,
        owner: "LoopHooks",
        path: AttnPath = "auto",
        forward: Hooks | None = None,
        backward: Hooks | None = None,
    ):
        self.owner, self.path, self.closed = owner, path, False
        self.rules = [(_matching(name), hook, "fwd") for name, hook in forward or ()]
        self.rules += [(_matching(name), hook, "bwd") for name, hook in backward or ()]
        self.fired: set[str] = set()
        self.loops_run: int | None = None
        self.frame: FrameType | None = None
        self.missed, self.reached = 0, False
        self._listeners: dict[str, dict[str, Listener]] = {}

    def listeners(self, prefix: str) -> "dict[str, Listener]":
        """Who listens to an application in this scope, by leaf."""
        if not self.rules:
            return {}
        found = self._listeners.get(prefix)
        if found is None:
            points = self.owner.points(prefix)
            made = {leaf: Listener.of(point, self.rules) for leaf, point in points.items()}
            found = self._listeners[prefix] = {leaf: listener for leaf, listener in made.items() if listener}
        return found

    def clear(self, direction: str = "both") -> None:
        """Drop the hooks of a direction."""
        self.rules = [rule for rule in self.rules if direction != "both" and rule[2] != direction]
        self._listeners = {}

    @contextmanager
    def open(self) -> Iterator["Scope"]:
        """Reach the calls made inside; closing order does not matter."""
        self.frame = _generator_frame()
        _OPEN.set((*_OPEN.get(), self))
        try:
            yield self
        finally:
            self.closed, self.frame = True, None
            if self.missed and not self.reached:
                warnings.warn(
                    f"{self.missed} calls were left as they were: this block was opened in a generator, and "
                    "reaches what that one calls itself; open it where the calls are made",
                    stacklevel=2,
                )
            _OPEN.set(tuple(scope for scope in _OPEN.get() if not scope.closed))


def _matching(name: "str | Names | Site") -> Names:
    return str(name).__eq__ if isinstance(name, str | Site) else name


def _generator_frame() -> FrameType | None:
    """The innermost generator that is running, those aside that stand for a `with` block or a test's fixture."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_back
        if frame.f_code.co_flags & GENERATOR and not _stands_for_a_block(caller):
            return frame
        frame = caller
    return None


GENERATOR = 0x20 | 0x200
"""co_flags of generators and asynchronous generators."""


def _stands_for_a_block(driver: FrameType | None) -> bool:
    module = "" if driver is None else driver.f_globals.get("__name__", "")
    return module == "contextlib" or module.startswith(("_pytest.", "pluggy."))


def _open_scopes(owner: "LoopHooks") -> tuple[Scope, ...]:
    """Those of a model that reach a call made here, outermost first."""
    scopes = [scope for scope in _OPEN.get() if scope.owner is owner and not scope.closed]
    if any(scope.frame is not None for scope in scopes):
        running, frame = set(), sys._getframe(1)
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        for scope in [scope for scope in scopes if scope.frame is not None and id(scope.frame) not in running]:
            scopes.remove(scope)
            scope.missed += 1
    for scope in scopes:
        scope.reached = True
    return tuple(scopes)


class Call:
    """One run of a hooked model: its attention path, who listens, and the context of what is running.

    `notes` is where interventions keep what they remember of this run.
    """

    def __init__(self, owner: "LoopHooks", path: AttnPath = "auto", own: Scope | None = None):
        self.owner, self.context = owner, None
        self.scopes = _open_scopes(owner) if own is None else (*_open_scopes(owner), own)
        pinned = [scope.path for scope in self.scopes if scope.path != "auto"]
        self.path: AttnPath = path if path != "auto" else cast(AttnPath, pinned[-1] if pinned else "auto")
        self.notes: dict[Any, Any] = {}

    context: Context | None

    def taps(self, prefix: str) -> Tap:
        """The tap of a layer application (a tap source for a core); a silent one where nobody listens."""
        heard = [(scope, found) for scope in self.scopes if (found := scope.listeners(prefix))]
        if heard or self.owner.hears(prefix):
            return HookTap(self, self.owner.points(prefix), heard)
        return EXPLICIT_TAP if self.path == "eager" else NO_TAP

    def ran(self, n_loops: int) -> None:
        """Note how many loops it made."""
        for scope in self.scopes:
            scope.loops_run = max(n_loops, scope.loops_run or 0)


class HookTap(Tap):
    """Hands the activations of one layer application to hook points: the model's own, then each scope's."""

    __slots__ = ("call", "heard", "points")

    def __init__(self, call: Call, points: dict[str, HookPoint], heard: list[tuple[Scope, dict[str, Listener]]]):
        self.call, self.points, self.heard = call, points, heard

    @property
    def explicit(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the caller pinned the explicit attention path."""
        return self.call.path == "eager"

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Run the hooks at a leaf, if there are any."""
        point = self.points[name]
        if point._forward_hooks or point._backward_hooks:
            x = self._fire(point, point, own_copy(point, x))
        for scope, listeners in self.heard:
            if name in listeners:
                x = self._fire(point, listeners[name], x)
                scope.fired.add(point.name or "")
        return x

    def _fire(self, point: HookPoint, hooks: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        token = _RUNNING.set(self.call)
        try:
            out = hooks(x)
        finally:
            _RUNNING.reset(token)
        if out.shape != x.shape:
            raise UsageError(
                f"a hook at {point.name} returned shape {list(out.shape)}, expected {list(x.shape)}; "
                "return a tensor of the same shape, or None"
            )
        return out

    def enter(self, context: Context) -> None:
        """Keep the context for the hooks of this application."""
        self.call.context = context

    def wants(self, *leaf_names: str) -> bool:
        """Whether a hook listens to one of these leaves."""
        for leaf in leaf_names:
            point = self.points[leaf]
            if point._forward_hooks or point._backward_hooks or any(leaf in found for _, found in self.heard):
                if self.call.path == "sdpa" and leaf in sites.EXPLICIT_ONLY:
                    raise UsageError(f'{point.name} does not exist on attn_path="sdpa"; use "auto" or "eager"')
                return True
        return False


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
        call = _RUNNING.get()
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
        if not any(map(chosen, sites.each_name(self.cfg, max(64, self.n_grown)))):
            hint = _hint(chosen, sites.all_names(self.cfg, 1))
            raise UnknownNameError(f"the filter matches no hook name; names look like {hint}")
        return chosen

    def _checked(self, hooks: Hooks | None) -> list[tuple[Any, Callable]]:
        """Hooks with their names known, or UsageError before anything is added; a list of names is a hook each."""
        found: Hooks = []
        for name, hook in hooks or ():
            if callable(name):
                found.append((self._matcher(name), hook))  # pyright: ignore[reportArgumentType]
                continue
            listed = [name] if isinstance(name, str | Site) else list(name)
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
        for scope in _open_scopes(self) if level is None else ():
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


def check_path(path: str) -> AttnPath:
    """A known attention path."""
    if path not in ("auto", "eager", "sdpa"):
        raise UsageError(f'attn_path must be "auto", "eager" or "sdpa", got {path!r}')
    return path


def warn_unfired(explicit: list[str], scope: Scope) -> None:
    """Name the hooks whose loop never ran, if anything ran."""
    missing = [name for name in dict.fromkeys(explicit) if name not in scope.fired]
    if missing and scope.loops_run is not None:
        warnings.warn(
            f"never fired: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} "
            f"({scope.loops_run} loops ran); raise n_loops or the rule's max_loops",
            stacklevel=4,
        )


def _hint(chosen: Names, every: list[str]) -> str:
    if isinstance(chosen, sites.Filter):
        return f"{every[1]}; the filter is {chosen!r}"
    words = [c for c in getattr(getattr(chosen, "__code__", None), "co_consts", ()) if isinstance(c, str)]
    near = [match for word in words for match in difflib.get_close_matches(word, every, n=2, cutoff=0.4)]
    return ", ".join(near or [every[1], every[-1]])
