"""Plots of what linear probes read off states, and of what pushing a cell does."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from loopmdm.analysis.plots.loops import DISTANCE_STYLE
from loopmdm.analysis.plots.style import NULL, interval_band, of_rows, reach

PUSH_STYLE = {
    "means": {"color": "#1b4f8f", "marker": "o", "linestyle": "-", "label": "difference of class means"},
    "unembedding": {"color": "#e08214", "marker": "^", "linestyle": "--", "label": "unembedding"},
    "probe": {"color": "#6baed6", "marker": "s", "linestyle": "-.", "label": "probe"},
    "random": {"color": "#8c8c8c", "marker": "D", "linestyle": ":", "label": "random, equal length"},
}


@of_rows
def plot_probes(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """AUC on held-out sequences over states, a line a `target`; dots: an untrained twin. Loop 0 is the prelude.

    `df`: rows of one model: target loop weights value low high.
    """
    ax = ax or plt.gca()
    for number, (target, part) in enumerate(df.groupby("target", sort=False)):
        look = DISTANCE_STYLE[number % len(DISTANCE_STYLE)]
        own = part[part["weights"] == "trained"].sort_values("loop")
        interval_band(ax, own["loop"] + 1, own, "value", label=target, **look)
        bare = part[part["weights"] != "trained"].sort_values("loop")
        ax.plot(bare["loop"] + 1, bare["value"], color=look["color"], marker=".", linestyle="none", markersize=2.5)
    ax.axhline(0.5, **NULL)
    ax.set_xticks(sorted(int(loop) + 1 for loop in df["loop"].unique()))
    ax.set(xlabel="after loop (0 = prelude)", ylabel="AUC, held out", ylim=(0.2, 1.02))
    return ax


@of_rows
def plot_steering(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A number over the loop of a push, a line a direction; `df`: direction loop value low high."""
    ax = ax or plt.gca()
    for name, look in PUSH_STYLE.items():
        part = df[df["direction"] == name].sort_values("loop")
        if len(part):
            ax.errorbar(part["loop"] + 1, part["value"], yerr=reach(part, "value"), linewidth=1.0, **look)
    ax.axhline(0, **NULL)
    ax.set(xlabel="pushed after loop (0 = prelude)")
    return ax
