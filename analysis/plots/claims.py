"""The table of claims as a picture: one row a claim, one cell a task."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from loopmdm.analysis.plots.style import of_rows

VERDICT_STYLE = {
    "supported": ("#c6dbef", "✓"),
    "not supported": ("#fdd0a2", "✗"),
    "equivalent": ("#d9d9d9", "="),
    "undecided": ("#f2f2f2", "?"),
    "not testable here": ("#ffffff", "∅"),
    "not run": ("#ffffff", "–"),
}
USUAL = "nats per token"
"""The unit of a claim that names none."""
FIRST, WIDTH = 0.5, 0.25
"""Where the first cell begins and how wide one is, in shares of the axes."""


@of_rows
def plot_claims(
    df: pd.DataFrame, columns: Sequence[tuple[str, tuple[str, ...]]], *, ax: Axes | None = None
) -> Axes:
    """`df`: claim task verdict estimate low high unit n_seeds n_against text.

    `columns`: title and the tasks shown under it. A task that is not the first of its column is named in its cell.
    """
    ax = ax or plt.gca()
    claims = list(dict.fromkeys(df["claim"]))
    for row, claim in enumerate(claims):
        part = df[df["claim"] == claim]
        unit = part["unit"].iloc[0]
        named = "" if unit == USUAL else f" [{unit}]"
        lines = "\n".join(textwrap.wrap(part["text"].iloc[0] + named, 64))
        ax.text(0, row, lines, ha="left", va="center", fontsize=6.3)
        for place, (_, tasks) in enumerate(columns):
            for cell in part[part["task"].isin(tasks)].itertuples():
                named = "" if cell.task == tasks[0] else f"{cell.task}: "
                _draw_cell(ax, (FIRST + WIDTH * place, row), cell, named)
    for place, (title, _) in enumerate(columns):
        ax.text(FIRST + WIDTH * (place + 0.48), -0.75, title, ha="center", va="center", fontsize=7.5)
    ax.set(xlim=(0, FIRST + WIDTH * len(columns)), ylim=(len(claims) - 0.45, -1.1))
    ax.set_axis_off()
    return ax


def _draw_cell(ax: Axes, at: tuple[float, int], cell, named: str) -> None:
    """A verdict `at` left edge and row: colour, sign and word; below it the estimate, its interval, the seeds."""
    left, row = at
    colour, sign = VERDICT_STYLE[cell.verdict]
    box = {"facecolor": colour, "edgecolor": "#bbbbbb", "linewidth": 0.4}
    ax.add_patch(Rectangle((left, row - 0.46), WIDTH * 0.96, 0.92, **box))
    middle = left + WIDTH * 0.48
    below = said(cell, short=True)
    place = {"ha": "center", "va": "center"}
    ax.text(middle, row - 0.18 * bool(below), f"{named}{sign} {cell.verdict}", fontsize=6.3, **place)
    ax.text(middle, row + 0.22, below, fontsize=5.2, **place)


def said(cell, short: bool = False) -> str:
    """Estimate, 95% interval, unit and number of seeds on one line; empty where there is no number.

    `short`: without the unit, and seeds as a number in brackets.
    """
    if not np.isfinite(cell.estimate):
        return ""
    bounds = f" [{cell.low:.3g}, {cell.high:.3g}]" if np.isfinite(cell.low) else ""
    runs = f"{cell.n_seeds} + {cell.n_against}" if cell.n_against else f"{cell.n_seeds}"
    if short:
        return f"{cell.estimate:.3g}{bounds} ({runs})"
    return f"{cell.estimate:.3g}{bounds} {cell.unit}; {runs} seed{'' if runs == '1' else 's'}"
