"""Named jobs in processes of their own, one after what it waits for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from loopmdm.model.files import clear_partial


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread inside: sums are in one order, and numbers the same on every machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_processes(
    work: Callable[[str, Path], object],
    after: Mapping[str, set[str]],
    folder: Path,
    workers: int = 0,
    prepare: Callable[[], None] | None = None,
) -> Iterator[str]:
    """`work(name, folder)` for each name of `after`, once the names it is to come after are done; yields names.

    `prepare` runs first in each process (default: one a core). What is interrupted leaves no process and nothing
    half-written in `folder`.
    """
    waiting = {name: needs & after.keys() for name, needs in after.items()}
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    most = min(workers or os.cpu_count() or 1, max(1, len(waiting)))
    with ProcessPoolExecutor(most, context, _start, (prepare,)) as pool:
        try:
            running: dict[Future, str] = {}
            while waiting or running:
                for name in [name for name, needs in waiting.items() if not needs]:
                    del waiting[name]
                    running[pool.submit(work, name, folder)] = name
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(done)
                    done.result()
                    for needs in waiting.values():
                        needs.discard(name)
                    yield name
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
                    child.join()
            clear_partial(folder)
            raise


def _start(prepare: Callable[[], None] | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # no traceback of its own
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if prepare is not None:
        prepare()


def _die_with_parent() -> None:
    """End this process when its parent does, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
