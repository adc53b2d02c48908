"""Detours: calls of somebody else's modules sent another way, for one call of one thread.

A detour maps modules to routes. While it is open a call of such a module, made in the thread that opened it, goes
to `route(native, *args, **kwargs)`; every other thread's call of the same module goes to the native forward, and
so does whatever a listener calls in between (`aside`). The module's own `forward`, or the one that another
library (accelerate) put into its `__dict__`, comes back when the last detour over it closes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import nn

Route = Callable[..., Any]
"""Takes the native forward and the call's arguments; gives what the caller gets."""


class Detour:
    """Routes by module, in force inside `open` in the thread that opened it, until another one opens there."""

    def __init__(self, routes: Mapping[nn.Module, Route]):
        self.routes = dict(routes)

    @property
    def in_force(self) -> bool:
        """Whether this thread's calls go by this detour now."""
        return _HERE.get() is self

    @contextmanager
    def open(self) -> Iterator["Detour"]:
        """Put the switches in place, and take away those that nobody else needs."""
        placed: list[nn.Module] = []
        token = _HERE.set(self)
        try:
            for module in self.routes:
                _place(module)
                placed.append(module)
            yield self
        finally:
            _HERE.reset(token)
            for module in placed:
                _take_away(module)


@contextmanager
def aside() -> Iterator[None]:
    """No detour is in force inside: a listener may call the model itself, or another."""
    token = _HERE.set(None)
    try:
        yield
    finally:
        _HERE.reset(token)


_HERE: ContextVar[Detour | None] = ContextVar("detour in force", default=None)
_LOCK = Lock()


@dataclass
class _Switch:
    """What stands in a module's `__dict__` as its forward, for how many detours, and what stood there before."""

    forward: Callable
    before: dict[str, Any]
    users: int = 1


_SWITCHES: dict[int, _Switch] = {}


def _place(module: nn.Module) -> None:
    with _LOCK:
        switch = _SWITCHES.get(id(module))
        if switch is not None:
            switch.users += 1
            return
        before = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
        forward = _switched(module, module.forward)
        _SWITCHES[id(module)] = _Switch(forward, before)
        module.__dict__["forward"] = forward


def _take_away(module: nn.Module) -> None:
    with _LOCK:
        switch = _SWITCHES[id(module)]
        switch.users -= 1
        if switch.users:
            return
        del _SWITCHES[id(module)]
        if (
            module.__dict__.get("forward") is switch.forward
        ):  # else somebody put another one on top: theirs to undo
            del module.__dict__["forward"]
            module.__dict__.update(switch.before)


def _switched(module: nn.Module, native: Callable) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        here = _HERE.get()
        route = None if here is None else here.routes.get(module)
        return native(*args, **kwargs) if route is None else route(native, *args, **kwargs)

    return forward
