"""The registry of figures: name -> tables, builder, caption. Batch, notebooks and tests all use it.

from loopmdm.analysis import figures
figures.FIGURES["mask-to-mask-by-loop"].draw(out="figures/out")
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib as mpl

from loopmdm.analysis.exhibits import (
    attention,
    causal,
    claims,
    inference,
    known,
    representation,
    stopping,
    training,
)
from loopmdm.analysis.exhibits.figure import Figure
from loopmdm.analysis.numbers.parallel import in_processes
from loopmdm.model.errors import unknown_name

FAMILIES = {
    "claims": claims,
    "training": training,
    "inference": inference,
    "stopping": stopping,
    "attention": attention,
    "representation": representation,
    "causal": causal,
    "known answers": known,
}
FIGURES = {item.name: item for family in FAMILIES.values() for item in family.FIGURES}


def figure(name: str) -> Figure:
    """A figure of the registry."""
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    return FIGURES[name]


def draw_all(names: Iterable[str], out: Path, workers: int = 0) -> Iterator[str]:
    """Draw figures into `out` in processes (default: one a core); yields names as they are done."""
    return in_processes(_draw, {name: set() for name in names}, out, workers, _without_display)


def _without_display() -> None:
    mpl.use("Agg")


def _draw(name: str, out: Path) -> None:
    figure(name).draw(out=out)
