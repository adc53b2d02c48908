"""Plots of what a state holds and hands on, by loop: lenses side by side, and how far a change travels."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from loopmdm.analysis.plots.style import LOOP, NULL, interval_band, of_rows

LENS_STYLE = {
    "coda": {"color": "#08306b", "marker": "o", "linestyle": "-"},
    "tuned": {"color": "#4292c6", "marker": "s", "linestyle": "--"},
    "jacobian": {"color": "#e08214", "marker": "^", "linestyle": "-."},
    "direct": {"color": "#8c8c8c", "marker": "D", "linestyle": ":"},
    "shuffled": {"color": "#c9c9c9", "marker": "x", "linestyle": ":", "label": "tuned, shuffled answers"},
}
LENS_LABELS = {
    "kl_final": "KL(final answer || lens) (nats)",
    "cross_entropy": "cross entropy (nats)",
    "agreement": "best token is the final one's (share)",
    "accuracy": "best token is the true one (share)",
}
DISTANCE_STYLE = (
    {"color": "#08306b", "marker": "o", "linestyle": "-"},
    {"color": "#4292c6", "marker": "s", "linestyle": "--"},
    {"color": "#6baed6", "marker": "P", "linestyle": "-."},
    {"color": "#e08214", "marker": "^", "linestyle": "-."},
    {"color": "#8c8c8c", "marker": "D", "linestyle": ":"},
    {"color": "#b8b8b8", "marker": "v", "linestyle": ":"},
    {"color": "#d9d9d9", "marker": "x", "linestyle": ":"},
)


@of_rows
def plot_lenses(df: pd.DataFrame, metric: str = "kl_final", *, ax: Axes | None = None, **kws: Any) -> Axes:
    """One metric of every lens over loops. `df`: rows of one model: loop lens metric value low high."""
    ax = ax or plt.gca()
    chosen = df[df["metric"] == metric]
    for lens, look in LENS_STYLE.items():
        part = chosen[chosen["lens"] == lens].sort_values("loop")
        if len(part):
            interval_band(ax, part["loop"], part, "value", **{"label": lens} | look | kws)
    ax.set_xticks(sorted(int(loop) for loop in df["loop"].unique()))
    ax.set(xlabel=LOOP, ylabel=LENS_LABELS[metric])
    ax.set_ylim(bottom=0)
    return ax


@of_rows
def plot_gain(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Gain over loops, a line a distance (on a board a relation), the pushed position left out; logarithmic.

    `df`: rows of metric "gain" of one model, direction, size, source and receiver: loop distance relation value
    low high.
    """
    ax = ax or plt.gca()
    df = pd.DataFrame(df[(df["distance"] != "0") & (df["value"] > 0)])
    kinds = list(dict.fromkeys(zip(df["distance"], df["relation"], strict=True)))
    for number, (distance, relation) in enumerate(kinds):
        part = df[(df["distance"] == distance) & (df["relation"] == relation)].sort_values("loop")
        name = f"|i - j| = {distance}" if relation == "any" else f"{relation} ({distance})"
        look = DISTANCE_STYLE[number % len(DISTANCE_STYLE)]
        interval_band(
            ax,
            part["loop"],
            part.assign(low=part["low"].clip(lower=1e-12)),
            "value",
            **{"label": name} | look | kws,
        )
    ax.set(xlabel=LOOP, ylabel="change there / push (share)", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    return ax


@of_rows
def plot_growth(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Growth of a change per loop, of all positions and of its own, nats; `df`: as `plot_gain`, of "growth"."""
    ax = ax or plt.gca()
    for name, look in zip(("total", "own"), DISTANCE_STYLE, strict=False):
        part = df[(df["distance"] == name) & df["value"].notna()].sort_values("loop")
        interval_band(ax, part["loop"], part, "value", **{"label": name} | look | kws)
    ax.axhline(0, **NULL)
    ax.set(xlabel=LOOP, ylabel="growth of the change\n(nats a loop)")
    return ax
