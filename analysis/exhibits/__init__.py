"""Exhibits: what the study shows, by name -> tables, builder, caption, answers to claims.

from loopmdm.analysis import figures
figures.FIGURES["mask-to-mask-by-loop"].draw(out="figures/out")
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib as mpl

from loopmdm.analysis.exhibits.registry import EXHIBITS, Exhibit, by_theme
from loopmdm.analysis.numbers.parallel import in_processes

__all__ = ["EXHIBITS", "FIGURES", "Exhibit", "by_theme", "draw_all"]

FIGURES = EXHIBITS
"""What notebooks and scripts know the registry as."""


def draw_all(names: Iterable[str], out: Path, workers: int = 0) -> Iterator[str]:
    """Draw figures into `out` in processes (default: one a core); yields names as they are done."""
    return in_processes(_draw, {name: set() for name in names}, out, workers, _without_display)


def _without_display() -> None:
    mpl.use("Agg")


def _draw(name: str, out: Path) -> None:
    EXHIBITS[name].draw(out=out)
