"""Work done on rows of a batch, whose results can be kept and taken up again: what makes shards of a measure.

A measure walks over its batches with `Rows.each(batch_size, work)`. Usually `work` is simply done. Inside
`keeping(ledger)` the ledger is asked instead, by a key that tells what the work was done on:

    key = (number of the first row in its whole, digest of the rows, how often these rows were asked before)

so that what one process computed is found by another that walks over the same rows in the same order, and nothing
is ever found that was computed on other rows, masks or documents. What work does inside work is not asked for.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from torch import Tensor

T = TypeVar("T")


@runtime_checkable
class Ledger(Protocol):
    """Who is asked for results."""

    def result(self, key: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, now or some time before."""
        ...


class _Asked:
    """A ledger, and how often it was asked about the same rows."""

    def __init__(self, ledger: Ledger):
        self.ledger, self.times = ledger, {}

    def result(self, rows: Any, work: Callable[[Any], T]) -> T:
        told = digest(rows)
        time = self.times[told] = self.times.get(told, -1) + 1
        with _set(None):
            return self.ledger.result(f"{told}:{time}", lambda: work(rows))


_ASKED: ContextVar[_Asked | None] = ContextVar("asked", default=None)


@contextmanager
def _set(asked: _Asked | None) -> Iterator[None]:
    token = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(token)


@contextmanager
def keeping(ledger: Ledger) -> Iterator[None]:
    """Inside, `ledger` is asked for the results of work."""
    with _set(_Asked(ledger)):
        yield


def done(rows: Any, work: Callable[[Any], T]) -> T:
    """`work(rows)`, or what is kept of it."""
    asked = _ASKED.get()
    return work(rows) if asked is None else asked.result(rows, work)


def digest(rows: Any) -> str:
    """Of all that a dataclass of rows holds; its `place` tells the number of its first row."""
    told = hashlib.sha256()
    for field in fields(rows):
        part = getattr(rows, field.name)
        if isinstance(part, Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            told.update(f"{field.name} {part.dtype} {part.shape};".encode())
            told.update(
                repr(part.tolist()).encode() if part.dtype.hasobject else np.ascontiguousarray(part).tobytes()
            )
    first = getattr(rows.place, "first", "")
    return f"{first}:{told.hexdigest()[:24]}"
