"""What belongs to one `with` block or one call of a hooked model: its hooks, its attention path, what fired.

Hooks of a `with` block or of one call live in a `Scope` of their own, not on the model: they reach the calls made
inside that block, in the thread that opened it. A block opened inside a generator reaches what that generator
calls while it runs, and nothing while it is suspended.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from types import FrameType
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopmdm.model import sites
from loopmdm.model.context import Context
from loopmdm.model.errors import UsageError, check_word
from loopmdm.model.sites import Names, Site
from loopmdm.model.taps import EXPLICIT_TAP, NO_TAP, Tap
from loopmdm.model.tiles import Asked, Attend

AttnPath = Literal["auto", "eager", "sdpa"]
Hooks = list[tuple[Any, Callable]]
OPEN: ContextVar[tuple["Scope", ...]] = ContextVar("open scopes", default=())
RUNNING: ContextVar["Call | None"] = ContextVar("call whose hook runs", default=None)


@runtime_checkable
class PointOwner(Protocol):
    """The model that has the hook points of a layer application, by leaf, below its `prefix`."""

    def points(self, prefix: str) -> dict[str, HookPoint]:
        """All of them, made where they are new."""
        ...

    def hears(self, prefix: str) -> bool:
        """Whether one of them has hooks of its own."""
        ...


Method = TypeVar("Method", bound=Callable[..., Any])


def untraced(method: Method) -> Method:
    """`method`, run as it is where torch.compile traces its caller: compiled code would not notice later hooks."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return cast(Method, run)


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
PATTERN = "attn.hook_pattern"
SHARED = ("hook_embed", "hook_in", "hook_out", "hook_resid_pre", "hook_resid_post")
"""Leaves whose tensor goes by other names, too, or is remembered as a state."""


def own_copy(point: HookPoint, x: Tensor) -> Tensor:
    """What a hook may write into: a copy where the tensor goes by other names, so that only this site changes."""
    return x.clone() if (point.name or "").endswith(SHARED) else x


class Listener:
    """A scope's hooks at one site: forward ones are called, backward ones hang on a point of their own.

    Those with an attribute `hears_last` are called after the hooks of all scopes, inner ones included. A hook at
    the pattern with a method `attend(asked, hook=)` does not ask for it: it is called if someone else does,
    and otherwise its `attend` computes z.
    """

    __slots__ = ("attend", "backward", "forward", "last", "point")

    def __init__(self, point: HookPoint, forward: list[Callable], backward: list[Callable]):
        self.point, self.backward = point, None
        self.last = [hook for hook in forward if getattr(hook, "hears_last", False)]
        self.forward = [hook for hook in forward if not getattr(hook, "hears_last", False)]
        alone = len(forward) == 1 and not backward
        self.attend = getattr(forward[0], "attend", None) if alone else None
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
        """Run the hooks as a HookPoint would, but those that hear last."""
        x = self._run(self.forward, x)
        return x if self.backward is None else self.backward(x)

    def end(self, x: Tensor) -> Tensor:
        """Run those that hear last."""
        return self._run(self.last, x)

    def _run(self, hooks: list[Callable], x: Tensor) -> Tensor:
        for hook in hooks:
            reads = getattr(hook, "reads_only", False)
            given = x if reads else own_copy(self.point, x)
            out = hook(given, hook=self.point)
            x = out if out is not None else x if reads else given
        return x


class Scope:
    """What holds inside one `with` block, or for one call: hooks, or a pinned attention path.

    `fired` names the points whose hooks ran, `loops_run` the most loops of a call inside. `frame` is the generator
    that opened it, if one did; `missed` counts the calls made while that was suspended, `reached` says whether any
    was reached.
    """

    def __init__(
        self,
        owner: PointOwner,
        path: AttnPath = "auto",
        forward: Hooks | None = None,
        backward: Hooks | None = None,
    ):
        self.owner, self.path, self.closed = owner, path, False
        self.rules = [(_matching(name), hook, "fwd") for name, hook in forward or ()]
        self.rules += [(_matching(name), hook, "bwd") for name, hook in backward or ()]
        if backward:
            self.rules.insert(0, (_matching("hook_embed"), _from_here, "fwd"))
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
        OPEN.set((*OPEN.get(), self))
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
            OPEN.set(tuple(scope for scope in OPEN.get() if not scope.closed))


def _from_here(x: Tensor, hook: HookPoint) -> Tensor | None:  # noqa: ARG001
    """Let gradients reach the first activation, also where the weights before it are frozen."""
    return x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else None


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


def open_scopes(owner: PointOwner) -> tuple[Scope, ...]:
    """Those of a model that reach a call made here, outermost first."""
    scopes = [scope for scope in OPEN.get() if scope.owner is owner and not scope.closed]
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

    def __init__(self, owner: PointOwner, path: AttnPath = "auto", own: Scope | None = None):
        self.owner, self.context = owner, None
        self.scopes = open_scopes(owner) if own is None else (*open_scopes(owner), own)
        pinned = [scope.path for scope in self.scopes if scope.path != "auto"]
        self.path: AttnPath = path if path != "auto" else cast(AttnPath, pinned[-1] if pinned else "auto")
        self.notes: dict[Any, Any] = {}

    context: Context | None

    @untraced
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

    @property
    @untraced
    def attend(self) -> Attend | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The one listener at the pattern that can do without it; asked where nobody wants it."""
        for scope, listeners in self.heard:
            if PATTERN in listeners and listeners[PATTERN].attend is not None:
                return partial(self._attend, scope, listeners[PATTERN])
        return None

    def _attend(self, scope: Scope, listener: Listener, asked: Asked) -> Tensor:
        assert listener.attend is not None and listener.point.name is not None
        scope.fired.add(listener.point.name)
        token = RUNNING.set(self.call)
        try:
            return listener.attend(asked, hook=listener.point)
        finally:
            RUNNING.reset(token)

    @untraced
    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Run the hooks at a leaf, if there are any."""
        point = self.points[name]
        if point._forward_hooks or point._backward_hooks:
            x = self._fire(point, point, own_copy(point, x))
        for scope, listeners in self.heard:
            if name in listeners:
                x = self._fire(point, listeners[name], x)
                scope.fired.add(point.name or "")
        for _, listeners in self.heard:
            if name in listeners and listeners[name].last:
                x = self._fire(point, listeners[name].end, x)
        return x

    def _fire(self, point: HookPoint, hooks: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        token = RUNNING.set(self.call)
        try:
            out = hooks(x)
        finally:
            RUNNING.reset(token)
        if not isinstance(out, Tensor) or out.dtype != x.dtype:
            found = out.dtype if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise UsageError(
                f"a hook at {point.name} returned {found}, expected a tensor of {x.dtype}; "
                "return one of the same shape and dtype, or None"
            )
        if out.shape != x.shape:
            raise UsageError(
                f"a hook at {point.name} returned shape {list(out.shape)}, expected {list(x.shape)}; "
                "return a tensor of the same shape, or None"
            )
        return out

    @untraced
    def enter(self, context: Context) -> None:
        """Keep the context for the hooks of this application."""
        self.call.context = context

    @untraced
    def wants(self, *leaf_names: str) -> bool:
        """Whether a hook listens to one of these leaves."""
        for leaf in leaf_names:
            point = self.points[leaf]
            if point._forward_hooks or point._backward_hooks or self._wanted(leaf):
                if self.call.path == "sdpa" and leaf in sites.EXPLICIT_ONLY:
                    raise UsageError(f'{point.name} does not exist on attn_path="sdpa"; use "auto" or "eager"')
                return True
        return False

    def _wanted(self, leaf: str) -> bool:
        """Whether a scope asks for a leaf; one that can attend instead does not, alone and without gradients."""
        found = [listeners[leaf] for _, listeners in self.heard if leaf in listeners]
        instead = [listener for listener in found if listener.attend is not None]
        return len(found) > len(instead) or len(instead) > 1 or (bool(instead) and torch.is_grad_enabled())


ATTN_PATHS: tuple[AttnPath, ...] = get_args(AttnPath)


def check_path(path: str) -> AttnPath:
    """A known attention path."""
    check_word("attn_path", path, ATTN_PATHS)
    return cast(AttnPath, path)


def warn_unfired(explicit: list[str], scope: Scope) -> None:
    """Name the hooks whose loop never ran, if anything ran."""
    missing = [name for name in dict.fromkeys(explicit) if name not in scope.fired]
    if missing and scope.loops_run is not None:
        warnings.warn(
            f"never fired: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} "
            f"({scope.loops_run} loops ran); raise n_loops or the rule's max_loops",
            stacklevel=4,
        )
