"""All tables, those of the study and those that exhibits bring along, and measuring several at once."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.registry import EXHIBITS
from loopmdm.analysis.exhibits.tables import Table
from loopmdm.analysis.numbers import place
from loopmdm.analysis.numbers.parallel import in_processes
from loopmdm.model.batching import at_a_time
from loopmdm.model.corpora.fetch import cached_archive, serving
from loopmdm.model.errors import UsageError, and_more, unknown_name
from loopmdm.model.network.checkpoints import list_models
from loopmdm.model.training.allocator import keep_freed_memory
from loopmdm.model.zoo.runs import Zoo


def all_tables() -> dict[str, Table]:
    """By name; UsageError if an exhibit's own has a name that is taken."""
    found = dict(tables.TABLES)
    for exhibit in EXHIBITS.values():
        for item in exhibit.own:
            if found.setdefault(item.name, item) is not item:
                raise UsageError(f"the table {item.name!r} of {exhibit.name} has a name that is taken; rename it")
    return found


def table(name: str) -> Table:
    """One of them; UnknownNameError with near matches."""
    found = all_tables()
    if name not in found:
        raise unknown_name("table", name, found)
    return found[name]


def check_stored(names: Iterable[str], remedy: str = "") -> None:
    """UsageError if a table is missing: what draws or reads does not start to measure unasked."""
    zoo = Zoo.shipped()
    missing = [name for name in names if tables.stored_in(table(name), zoo) is None]
    if missing:
        raise UsageError(
            f"table {missing[0]}{and_more(missing)} not in {tables.tables_folder()}; restore it from the "
            f"repository, or measure it, {tables.HOW_LONG}: {remedy or f'loopmdm table {missing[0]}'}"
        )


def check_weights(names: Iterable[str]) -> None:
    """UsageError if weights that tables are measured from are not here, but can be fetched."""
    zoo, here = Zoo.shipped(), set(list_models())
    runs = dict.fromkeys(run for name in names for run in table(name).models.of(zoo))
    missing = [run.name for run in runs if run.weights and run.name not in here]
    if missing:
        raise UsageError(
            f"the weights of {missing[0]}{and_more(missing)} are not here; fetch them: `loopmdm models fetch all`"
        )


def measure_all(
    names: Iterable[str], workers: int = 0, device: str = place.USUAL, batch_size: int | None = None
) -> Iterator[str]:
    """Measure tables in processes of one thread each (default: one a core); yields names as they are done.

    On another `device` than the CPU one after the other, as they would share its memory. A table that reads others
    waits for them. UsageError, before anything is measured, where archives or weights are
    missing.
    """
    names = list(names)
    _need_archives(names)
    check_weights(names)
    after = {name: set(table(name).tables) for name in names}
    work = partial(measure_one, device=device, batch_size=batch_size)
    workers = workers if device == place.USUAL else 1
    return in_processes(work, after, tables.measured_folder(), workers, _prepare)


def _need_archives(names: list[str]) -> None:
    wanted = {name: table(name).reads for name in names if table(name).reads}
    missing = {
        name: reads
        for name, reads in wanted.items()
        if any(cached_archive(item) is None for item in serving(reads))
    }
    if missing:
        raise UsageError(
            f"what the tables {', '.join(missing)} read is not here yet; "
            f"run `loopmdm data fetch {' '.join(dict.fromkeys(missing.values()))}`"
        )


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()


def measure_one(name: str, folder: Path, device: str = place.USUAL, batch_size: int | None = None) -> pd.DataFrame:
    """Measure a table into a folder with models on `device`, `batch_size` sequences at a time (None: as usual)."""
    with place.on_device(device), at_a_time(batch_size):
        return table(name).measure(folder)
