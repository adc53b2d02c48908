"""What one sees while a command works: a bar or a spinner on a terminal, elsewhere a line a minute on stderr."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn

err = Console(stderr=True)
EVERY = 60.0
"""Seconds between lines: a log of hours stays readable, and a job that hangs is seen."""


def say(line: str) -> None:
    """A line on standard error, such as what is about to happen."""
    err.print(line, soft_wrap=True, markup=False, highlight=False)


def working(what: str) -> AbstractContextManager[object]:
    """Around work of which nothing is known but what it is."""
    if err.is_terminal:
        return err.status(what)
    start = monotonic()
    return _lines(lambda: [f"{what}: {told(monotonic() - start)} so far"])


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Around work in countable steps: `track` of the bar counts what is iterated over."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    live = err.is_terminal  # a bar that is not refreshed counts at once
    with Progress(*columns, console=err, transient=True, disable=not live, auto_refresh=live) as bar:
        if live:
            yield bar
            return
        with _lines(lambda: [_line(task) for task in bar.tasks if not task.finished]):
            yield bar


def _line(task: Task) -> str:
    elapsed, done, total = task.elapsed or 0.0, task.completed, task.total or 0.0
    left = f"about {told(elapsed * (total - done) / done)} left" if done and total else f"{told(elapsed)} so far"
    return f"{task.description}: {done:g} of {total:g}, {left}"


def told(seconds: float) -> str:
    """A time as one says it: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _lines(lines: Callable[[], list[str]]) -> Iterator[None]:
    """Print what `lines` gives, every so often until the work inside ends."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(EVERY):
            for line in lines():
                say(line)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
