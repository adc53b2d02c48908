"""The table of claims as a picture: a row a claim and task, with verdict, estimate and interval."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from loopmdm.analysis.plots.style import NULL, of_rows

VERDICT_STYLE = {
    "supported": ("#1b4f8f", "✓"),
    "not supported": ("#b35806", "✗"),
    "equivalent": ("#595959", "="),
    "undecided": ("#8c8c8c", "?"),
    "not testable here": ("#bbbbbb", "∅"),
    "not run": ("#bbbbbb", "–"),
}
"""Colour and sign: blue as claimed, orange against it."""
PLACES = {"claim": 0.0, "task": 0.405, "verdict": 0.455, "axis": (0.585, 0.745), "said": 0.755}
"""Where columns begin, in shares of the width; the axis' ends."""


@of_rows
def plot_claims(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A row a claim and task: claim, task, verdict, estimate with 95% on an axis, and in figures with its unit.

    The axis of a row begins at the margin (the line in the middle) and has its own scale, so that the interval
    just fits; right of it lies what is claimed, whatever the direction. `df`: claim task verdict estimate low high
    unit margin direction n_seeds n_against text.
    """
    ax = ax or plt.gca()
    left, right = PLACES["axis"]
    middle, half = (left + right) / 2, (right - left) / 2
    place = {"va": "center", "fontsize": 6.3}
    last = None
    for row, cell in enumerate(df.itertuples()):
        if cell.claim != last:
            ax.axhline(row - 0.5, color="#dddddd", linewidth=0.5)
            rows = int((df["claim"] == cell.claim).sum())
            lines = "\n".join(textwrap.wrap(cell.text, 62))
            ax.text(PLACES["claim"], row + (rows - 1) / 2, lines, **place)
        last = cell.claim
        colour, sign = VERDICT_STYLE[cell.verdict]
        ax.text(PLACES["task"], row, cell.task, **place)
        bold = "bold" if cell.verdict in ("supported", "not supported") else "normal"
        ax.text(PLACES["verdict"], row, f"{sign} {cell.verdict}", color=_ink(colour), fontweight=bold, **place)
        ax.text(PLACES["said"], row, said(cell), **place)
        _draw_interval(ax, row, cell, (middle, half))
    ax.plot([middle, middle], [-0.5, len(df) - 0.5], **NULL)
    for name, at, side in (("claim", PLACES["claim"], "left"), ("task", PLACES["task"], "left"),
                           ("verdict", PLACES["verdict"], "left"), ("against | as claimed", middle, "center"),
                           ("estimate (95%) unit; seeds", PLACES["said"], "left")):  # fmt: skip
        ax.text(at, -1.1, name, ha=side, va="center", fontsize=7, fontweight="bold")
    ax.set(xlim=(0, 1), ylim=(len(df) - 0.4, -1.6))
    ax.set_label("A table: a row a claim and task, with verdict, interval against the margin, estimate and seeds")
    ax.set_axis_off()
    return ax


def _ink(colour: str) -> str:
    """Words are never paler than this."""
    return "#666666" if colour == "#bbbbbb" else colour


def _draw_interval(ax: Axes, row: int, cell, axis: tuple[float, float]) -> None:
    """Estimate and interval relative to the margin, claimed side to the right, scaled so that they fit."""
    if not np.isfinite(cell.estimate):
        return
    middle, half = axis
    sign = 1 if cell.direction == "above" else -1
    ends = [value for value in (cell.estimate, cell.low, cell.high) if np.isfinite(value)]
    far = max(abs(value - cell.margin) for value in ends) or 1.0
    at = [middle + 0.95 * half * sign * (value - cell.margin) / far for value in ends]
    colour = VERDICT_STYLE[cell.verdict][0]
    ax.add_patch(Rectangle((middle - half, row - 0.32), 2 * half, 0.64, facecolor="#f7f7f7", edgecolor="none"))
    ax.plot(at[1:], [row] * len(at[1:]), color=colour, linewidth=1.2)
    ax.plot(at[0], row, color=colour, marker="o", markersize=3.2,
            markerfacecolor=colour if len(at) > 1 else "white")  # fmt: skip


def said(cell) -> str:
    """Estimate, 95% interval, unit and number of seeds on one line; empty where there is no number."""
    if not np.isfinite(cell.estimate):
        return ""
    bounds = f" [{cell.low:.3g}, {cell.high:.3g}]" if np.isfinite(cell.low) else ""
    runs = f"{cell.n_seeds} + {cell.n_against}" if cell.n_against else f"{cell.n_seeds}"
    return f"{cell.estimate:.3g}{bounds} {cell.unit}; {runs} seed{'' if runs == '1' else 's'}"
