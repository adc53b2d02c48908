"""How many sequences run at a time: a matter of memory, not of what is computed, and so no option of a measure.

Every function that runs a model in batches has a usual size. Inside `at_a_time(n)` all of them take n instead, as
`torch.set_num_threads` is obeyed by all that computes: what is measured, and how it is kept, does not name it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from loopmdm.model.errors import check_count

_WANTED: ContextVar[int | None] = ContextVar("batch_size", default=None)


@contextmanager
def at_a_time(batch_size: int | None) -> Iterator[None]:
    """Whatever runs a model inside takes `batch_size` sequences at a time; None: as outside."""
    before = _WANTED.set(wanted() if batch_size is None else check_count("batch_size", batch_size))
    try:
        yield
    finally:
        _WANTED.reset(before)


def wanted() -> int | None:
    """What `at_a_time` asks for here; None: nobody asks, and each function takes its usual size."""
    return _WANTED.get()


def size_of_batches(usual: int) -> int:
    """What `at_a_time` wants, or else the `usual` size, which must be a count."""
    check_count("batch_size", usual)
    return wanted() or usual
