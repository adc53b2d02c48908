"""Plots of head cards: where a head looks and what it does over loops, and an example map."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loopmdm.analysis.plots.style import LOOP, NULL, PAGE, interval_band, of_rows, plainly, style

RELATION_STYLE = {
    name: {"color": colour, "marker": marker, "linestyle": line}
    for name, colour, marker, line in (
        ("self", "#8c8c8c", ".", ":"),
        ("box", "#08306b", "o", "-"),
        ("row", "#4292c6", "s", "--"),
        ("column", "#e08214", "^", "-."),
        ("none", "#c9c9c9", "D", ":"),
        ("previous", "#08306b", "o", "-"),
        ("next", "#e08214", "^", "-."),
        ("same", "#4292c6", "s", "--"),
        ("near", "#9ecae1", "P", "-"),
        ("far", "#c9c9c9", "D", ":"),
    )
}
READ_STYLE = {
    "direct": {"color": "#8c8c8c", "marker": "D", "linestyle": ":"},
    "gradient": {"color": "#e08214", "marker": "^", "linestyle": "-."},
    "now": {"color": "#08306b", "marker": "o", "linestyle": "-"},
    "removed": {"color": "#6baed6", "marker": "s", "linestyle": "--"},
}


@of_rows
def plot_head_attention(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Attention of one head by relation over loops; `df`: loop metric of value low high."""
    ax = ax or plt.gca()
    _lines(ax, df[df["metric"] == "attention"], "of", RELATION_STYLE, **kws)
    ax.set(xlabel=LOOP, ylabel="attention (share)", ylim=(0, 1))
    return ax


@of_rows
def plot_head_effects(df: pd.DataFrame, keys: str = "clean", *, ax: Axes | None = None, **kws: Any) -> Axes:
    """What one head does for the symbols on clean (or masked) keys, by read; below 0 it suppresses them.

    `df`: loop metric of value low high.
    """
    ax = ax or plt.gca()
    _lines(ax, df[df["of"] == keys], "metric", READ_STYLE, **kws)
    ax.axhline(0, **NULL)
    ax.set(xlabel=LOOP, ylabel=f"logit of what {keys} keys\nhold, less others (nats)", yscale="symlog")
    ax.set_yticks([-10, -1, 0, 1, 10], ["-10", "-1", "0", "1", "10"])
    ax.set_yticks([], minor=True)
    return ax


def _lines(ax: Axes, df: pd.DataFrame, column: str, looks: dict[str, dict[str, Any]], **kws: Any) -> None:
    for name, look in looks.items():
        part = df[(df[column] == name) & df["value"].notna()].sort_values("loop")
        if len(part):
            interval_band(ax, part["loop"], part, "value", **{"label": name} | look | kws)
    if ax.lines:
        ax.legend(frameon=False)


def plot_card(df: pd.DataFrame, name: str = "", example: Any = None) -> Figure:
    """A head's card: attention, effects for clean and masked keys and, if given, a map `example` [query, key].

    `df`: rows of `head_cards` of one head, model and mask ratio, with low and high.
    """
    with style():
        if not len(df):
            raise ValueError("plot_card: the frame has no rows; give one that was measured")
        n = 3 if example is None else 4
        figure, axes = plt.subplots(1, n, figsize=(PAGE * n / 3, 2.3), layout="constrained")
        plot_head_attention(df, ax=axes[0])
        for keys, ax in zip(("clean", "masked"), axes[1:3], strict=True):
            plot_head_effects(df, keys, ax=ax)
        if example is not None:
            axes[3].imshow(example, cmap="Greys", vmin=0, interpolation="nearest")
            axes[3].set(xlabel="key", ylabel="query")
            axes[3].grid(visible=False)
        figure.suptitle(plainly(name))
        return figure
