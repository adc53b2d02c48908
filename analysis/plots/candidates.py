"""Pencil marks: one Sudoku board over loops, and when loops give up what rounds of propagation exclude."""

from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection, PathCollection
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from loopmdm.analysis.plots.style import LOOP, interval_band, of_rows

GAP = 1.1
"""Between panels, in cells."""
GIVEN, SETTLED, WRONG, OPEN = "#ececec", "#cfe2f3", "#e69138", "#ffffff"
RIGHT_INK, WRONG_INK, MARK_INK, CHANGE = "#0b3d70", "#000000", "#1a1a1a", "#1b4f8f"
LEAST_SHOWN = 0.03
"""Marks paler than this are left out."""
DARKNESS = 0.6
"""The ink of a mark is p to this power: a symbol among six equal ones can be seen."""


@of_rows
def plot_candidates(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """One board, a panel after each loop and one of propagation; `df`: `example_board`'s.

    Clues are bold on grey. In an open cell each symbol has its place, as dark as it is probable; a cell with one
    live symbol left shows that large, on blue if it is the solution's and struck out on orange if it is not. Cells
    whose best symbol changed since the panel before are framed. `kws` go to the symbols, small and large.
    """
    ax = ax or plt.gca()
    size = int(df["symbol"].max())
    shift = dict(zip(df["panel"].unique(), np.arange(df["panel"].nunique()) * (size + GAP), strict=True))
    df = df.assign(x=df["column"] + df["panel"].map(shift), y=df["row"])
    cells = df.drop_duplicates(["panel", "cell"])
    _draw_cells(ax, cells)
    _draw_marks(ax, df[~df["clue"] & ~df["settled"] & (df["p"] > LEAST_SHOWN)], _places(df), **kws)
    _draw_symbols(ax, cells[cells["clue"] | cells["settled"]], **kws)
    for panel, x in shift.items():
        _draw_lines(ax, df[df["panel"] == panel], x, size)
        ax.text(x + size / 2, -0.35, _after(panel), ha="center", va="bottom")
    _explain(ax, len(shift))
    ax.set(xlim=(-0.1, max(shift.values()) + size + 0.1), ylim=(size + 0.1, -1.0), aspect="equal")
    ax.set_label(f"{len(shift)} Sudoku boards with pencil marks: {', '.join(_after(panel) for panel in shift)}")
    ax.set_axis_off()
    return ax


def _after(panel: str) -> str:
    """A panel's title: boards are counted by the loops that were run, as S is."""
    name, _, count = panel.partition(" ")
    return panel if name != "loop" else f"after {count} loop{'s' * (count != '1')}"


def _explain(ax: Axes, n_panels: int) -> None:
    """What backgrounds and frames say, below the boards."""
    looks = {
        "clue": {"facecolor": GIVEN, "edgecolor": "#333333", "linewidth": 0.4},
        "one symbol left, right": {"facecolor": SETTLED, "edgecolor": "#333333", "linewidth": 0.4},
        "one symbol left, wrong": {
            "facecolor": WRONG,
            "edgecolor": "#333333",
            "linewidth": 0.4,
            "hatch": "//////",
        },
        "open: the darker, the more probable": {"facecolor": OPEN, "edgecolor": "#333333", "linewidth": 0.4},
        "best symbol changed": {"facecolor": OPEN, "edgecolor": CHANGE, "linewidth": 1.4},
    }
    handles = [Patch(label=label, **look) for label, look in looks.items()]
    columns = min(len(looks), max(1, n_panels))
    legend = ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=columns, frameon=False,
        handlelength=1.1, handleheight=1.1, columnspacing=1.6,
    )  # fmt: skip
    legend.set_in_layout(n_panels >= len(looks))  # wider than few boards, which it must not squeeze


def _draw_cells(ax: Axes, cells: pd.DataFrame) -> None:
    """Backgrounds, and frames where something changed."""
    colours = np.select(
        [cells["clue"], cells["settled"] & cells["right"], cells["settled"]], [GIVEN, SETTLED, WRONG], OPEN
    )
    boxes = [Rectangle((x, y), 1, 1) for x, y in zip(cells["x"], cells["y"], strict=True)]
    ax.add_collection(PatchCollection(boxes, facecolors=colours.tolist(), edgecolors="none", zorder=1))
    moved = cells[cells["changed"]]
    frames = [Rectangle((x + 0.06, y + 0.06), 0.88, 0.88) for x, y in zip(moved["x"], moved["y"], strict=True)]
    ax.add_collection(
        PatchCollection(frames, facecolors="none", edgecolors=CHANGE, linewidths=1.1, linestyles="-", zorder=4)
    )


def _places(df: pd.DataFrame) -> tuple[int, int]:
    """Rows and columns of the marks of a cell, those of a box."""
    box = df[df["box"] == df["box"].min()]
    return box["row"].nunique(), box["column"].nunique()


def _draw_marks(ax: Axes, marks: pd.DataFrame, places: tuple[int, int], **kws: Any) -> None:
    """Symbols still considered, small, each in its place."""
    rows, columns = places
    place = marks["symbol"] - 1
    x = marks["x"] + 0.5 + (place % columns - (columns - 1) / 2) * 0.82 / columns
    y = marks["y"] + 0.5 + (place // columns - (rows - 1) / 2) * 0.78 / rows
    height = 0.29 if columns > 2 else 0.34
    ink = 1 - (1 - 0.1) * marks["p"].to_numpy() ** DARKNESS
    paths = [_numeral(str(s), height, False, a, b) for s, a, b in zip(marks["symbol"], x, y, strict=True)]
    colours = np.repeat(ink[:, None], 3, axis=1)
    look = {"facecolors": colours, "edgecolors": "none", "zorder": 3}
    ax.add_collection(PathCollection(paths, **look | kws))


def _draw_symbols(ax: Axes, cells: pd.DataFrame, **kws: Any) -> None:
    """Clues, bold, and settled symbols; wrong ones are struck out."""
    paths = [
        _numeral(str(s), 0.5, bool(clue), x + 0.5, y + 0.5)
        for s, clue, x, y in zip(cells["best"], cells["clue"], cells["x"], cells["y"], strict=True)
    ]
    colours = np.select([cells["clue"], cells["right"]], ["#000000", RIGHT_INK], WRONG_INK)
    look = {"facecolors": colours.tolist(), "edgecolors": "none", "zorder": 3}
    ax.add_collection(PathCollection(paths, **look | kws))
    wrong = cells[~cells["clue"] & ~cells["right"]]
    lines = [[(x + 0.2, y + 0.8), (x + 0.8, y + 0.2)] for x, y in zip(wrong["x"], wrong["y"], strict=True)]
    ax.add_collection(LineCollection(lines, colors="#000000", linewidths=0.8, zorder=5))


def _draw_lines(ax: Axes, cells: pd.DataFrame, x: float, size: int) -> None:
    """Thin lines between cells, thick ones between boxes."""
    rows, columns = _places(cells)
    lines, widths = [], []
    for place in range(size + 1):
        lines += [[(x, place), (x + size, place)], [(x + place, 0), (x + place, size)]]
        widths += [1.3 if place % step == 0 else 0.4 for step in (rows, columns)]
    ax.add_collection(LineCollection(lines, colors="#333333", linewidths=widths, zorder=2, capstyle="projecting"))


@cache
def _glyph(text: str, bold: bool) -> Path:
    """A numeral of height 1 about the origin, upside up where y grows downwards."""
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    path = TextPath((0, 0), text, size=1, prop=font)
    bounds = path.get_extents()
    middle = (bounds.x0 + bounds.x1) / 2, (bounds.y0 + bounds.y1) / 2
    upright = Affine2D().translate(-middle[0], -middle[1]).scale(1 / bounds.height, -1 / bounds.height)
    return upright.transform_path(path)


def _numeral(text: str, height: float, bold: bool, x: float, y: float) -> Path:
    return Affine2D().scale(height).translate(x, y).transform_path(_glyph(text, bold))


SHADES = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
MARKERS = ("o", "s", "^", "D", "v", "P")


@of_rows
def plot_deaths(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Heat map: of the symbols that round r excludes, the share that each loop gives up for good; rows sum to 1.

    `df`: rows of one arm and one rule of the measure "candidates" (metric death). Frames: where a loop is a round.
    `kws` go to `imshow`.
    """
    ax = ax or plt.gca()
    df = _with_round(df, "death")
    last = int(df["n_loops"].max())
    table = df.assign(at=df["loop"].fillna(last)).pivot(index="round", columns="at", values="value")
    values = table.to_numpy(dtype=float)
    image = ax.imshow(values, **{"cmap": "Blues", "vmin": 0, "vmax": 1, "aspect": "auto"} | kws)
    for (row, column), value in np.ndenumerate(values):
        shade = "white" if value > 0.55 else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.2, color=shade)
    for row, step in enumerate(table.index):
        if step < last:
            ax.add_patch(Rectangle((step - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d95f02", linewidth=1.3))
    ax.set_xticks(range(last + 1), [*map(str, range(last)), "never"])
    ax.set_yticks(range(len(table)), ["clues", *map(str, table.index[1:])] if table.index[0] == 0 else table.index)
    ax.set(xlabel="loop that gives the symbol up (0 = first)", ylabel="round that excludes it")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label="symbols (share)")
    return ax


@of_rows
def plot_live(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Share of symbols still considered after each loop, a line for each round that excludes them, shades 95%.

    `df`: rows of one arm and one rule of the measure "candidates" (metric live).
    """
    ax = ax or plt.gca()
    df = _with_round(df, "live")
    for number, (step, part) in enumerate(df.groupby("round")):
        part, place = part.sort_values("loop"), min(number, len(SHADES) - 1)
        label = "clues" if step == 0 else f"round {step}"
        look = {"color": SHADES[place], "marker": MARKERS[place], "label": label}
        interval_band(ax, part["loop"].astype(int), part, "value", **look | kws)
    ax.set(xlabel=LOOP, ylabel="still considered (share)", ylim=(-0.02, 1.02))
    ax.legend(title="excluded by", title_fontsize="small", fontsize="small", ncols=2, loc="best")
    return ax


def _with_round(df: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of a metric, without those of what is never excluded."""
    found = df[(df["metric"] == metric) & df["round"].notna()]
    if not len(found) or found.duplicated(["loop", "round"]).any():
        raise ValueError(f"give the rows of one arm and one rule that hold the metric {metric!r}")
    return found
