"""Plots of who tells whom over loops, and of states exchanged within classes."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from loopmdm.analysis.plots.style import CLEAN, LOOP, MASKED, NULL, of_rows, reach

SHORT = {"masked": "m", "clean": "c"}
SURE = "value", "low", "high"
CLASS_STYLE = {
    "candidates": {"color": "#1b4f8f", "marker": "o", "label": "same candidates"},
    "truth": {"color": "#444444", "marker": "D", "label": "same hidden symbol"},
    "number": {"color": "#e08214", "marker": "^", "label": "as many candidates"},
    "any": {"color": "#8c8c8c", "marker": "s", "label": "any hidden cell"},
}
"""Within what hidden cells are exchanged."""


@of_rows
def plot_edge_effects(df: pd.DataFrame, *, most: float | None = None, ax: Axes | None = None, **kws: Any) -> Axes:
    """Who tells whom: relation and group by loop, KL of the answer as shade and number (thousandths of a nat).

    `df`: rows of one model, method and metric "kl": loop relation keys queries value low high; "m" masked, "c"
    clean, key first. Brackets where the interval holds 0. `most` is the end of the scale, the largest value if
    it is not given.
    """
    ax = ax or plt.gca()
    df = df.assign(row=df["relation"] + " " + df["keys"].map(SHORT) + "→" + df["queries"].map(SHORT))
    order = list(dict.fromkeys(df["row"]))
    value, low, high = (df.pivot(index="row", columns="loop", values=name).loc[order] for name in SURE)
    shown = 1e3 * value.clip(lower=0)
    most = max(float(np.nanmax(shown.to_numpy())), 1e-6) if most is None else most
    look = {"cmap": "Blues", "norm": LogNorm(1e-3 * most, most), "aspect": "auto"}
    image = ax.imshow(shown.clip(lower=1e-3 * most), **look | kws)
    for (row, column), number in np.ndenumerate(1e3 * value.to_numpy()):
        sure = low.iat[row, column] > 0 or high.iat[row, column] < 0
        digits = 0 if number >= 9.5 else 1 if number >= 0.95 else 2
        text = f"{number:.{digits}f}" if number >= 0.005 else "0"
        text = text if sure or text == "0" else f"({text})"
        colour = "white" if number > 0.1 * most else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=5.5, color=colour)
    ax.set_xticks(range(value.shape[1]), [str(loop) for loop in value.columns])
    ax.set_yticks(range(len(order)), order, fontsize=6)
    ax.grid(False)
    ax.set(xlabel=LOOP, ylabel="relation, key → query (m masked, c clean)")
    bar = ax.figure.colorbar(image, ax=ax, label="KL (nats / 1000); (..): 95% holds 0")
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.minorticks_off()
    return ax


@of_rows
def plot_relays(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """KL that two-hop paths carry, by relation of the second hop; a bar a relay group, one pair of loops.

    `df`: rows of one model, loop and second loop, metric "kl": relay relation value low high.
    """
    ax = ax or plt.gca()
    relations = list(dict.fromkeys(df["relation"]))
    for number, (relay, colour) in enumerate((("masked", MASKED), ("clean", CLEAN))):
        part = df[df["relay"] == relay].set_index("relation").reindex(relations)
        place = np.arange(len(relations)) + 0.36 * (number - 0.5)
        errors = 1e3 * reach(part, "value")
        look = {"width": 0.34, "color": colour, "label": f"by way of {relay}", "error_kw": {"linewidth": 0.8}}
        ax.bar(place, 1e3 * part["value"], yerr=errors, **look | kws)
    ax.set_xticks(range(len(relations)), relations, fontsize=7 if len(relations) < 5 else 5.5)
    ax.set(xlabel="relation of relay and receiver", ylabel="KL (nats / 1000)")
    return ax


@of_rows
def plot_scrubbing(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """KL from the intact answer when states are exchanged, over rounds of propagation, a line a class; one loop.

    `df`: round arm kl low high.
    """
    ax = ax or plt.gca()
    for arm, look in CLASS_STYLE.items():
        part = df[df["arm"] == arm].drop_duplicates("round").sort_values("round")
        ax.errorbar(part["round"], part["kl"], yerr=reach(part, "kl"), **{"linewidth": 1.0} | look | kws)
    ax.axhline(0, **NULL)
    ax.set_xticks(sorted(df["round"].unique()))
    ax.set(xlabel="rounds of propagation", ylabel="KL from the intact\nanswer (nats a cell)")
    return ax
