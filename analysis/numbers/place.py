"""Where the numbers of tables are made: on the CPU unless somebody asks for another, which is recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from loopmdm.model.network.checkpoints import check_device

USUAL = "cpu"
_DEVICE: ContextVar[str] = ContextVar("device", default=USUAL)


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Models that are opened inside without naming a device run on this one; UsageError if it is not here."""
    before = _DEVICE.set(str(check_device(device)))
    try:
        yield
    finally:
        _DEVICE.reset(before)


def device() -> str:
    """The device of models that name none."""
    return _DEVICE.get()


def told() -> dict[str, Any]:
    """What a kept number names beside its question: another device rounds otherwise. Nothing for the usual one."""
    return {} if device() == USUAL else {"device": device()}
