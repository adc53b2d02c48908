"""Plots of what linear probes read off states, and of what pushing a cell does."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from loopmdm.analysis.plots.loops import DISTANCE_STYLE
from loopmdm.analysis.plots.style import LOOP, NULL, interval_band, of_rows, reach

PUSH_STYLE = {
    "means": {"color": "#1b4f8f", "marker": "o", "linestyle": "-", "label": "difference of class means"},
    "unembedding": {"color": "#e08214", "marker": "^", "linestyle": "--", "label": "unembedding"},
    "probe": {"color": "#6baed6", "marker": "s", "linestyle": "-.", "label": "probe"},
    "random": {"color": "#8c8c8c", "marker": "D", "linestyle": ":", "label": "random, equal length"},
}


@of_rows
def plot_probes(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """AUC on held-out sequences over states, a line a `target`; dots: an untrained twin. Loop -1 is the prelude.

    `df`: rows of one model: target loop weights value low high.
    """
    ax = ax or plt.gca()
    for number, (target, part) in enumerate(df.groupby("target", sort=False)):
        look = DISTANCE_STYLE[number % len(DISTANCE_STYLE)]
        own = part[part["weights"] == "trained"].sort_values("loop")
        interval_band(ax, own["loop"], own, "value", **{"label": target} | look | kws)
        bare = part[part["weights"] != "trained"].sort_values("loop")
        ax.plot(bare["loop"], bare["value"], color=look["color"], marker=".", linestyle="none", markersize=2.5)
    ax.axhline(0.5, **NULL)
    _mark_prelude(df, ax)
    ax.set(xlabel=f"after {LOOP}", ylabel="AUC, held out (share of pairs)", ylim=(0.2, 1.02))
    return ax


@of_rows
def plot_steering(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """A number over the loop of a push, a line a direction; `df`: direction loop value low high."""
    ax = ax or plt.gca()
    for name, look in PUSH_STYLE.items():
        part = df[df["direction"] == name].sort_values("loop")
        if len(part):
            ax.errorbar(part["loop"], part["value"], yerr=reach(part, "value"), **{"linewidth": 1.0} | look | kws)
    ax.axhline(0, **NULL)
    _mark_prelude(df, ax)
    ax.set(xlabel=f"pushed after {LOOP}")
    return ax


def _mark_prelude(df: pd.DataFrame, ax: Axes) -> None:
    """Loops as ticks; "in" is what the prelude hands to the first."""
    loops = sorted(int(loop) for loop in df["loop"].unique())
    ax.set_xticks(loops, ["in" if loop < 0 else str(loop) for loop in loops])
