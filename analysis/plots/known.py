"""Plots of tasks whose answer is known: Sudoku boards by loop, and generation orders."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from loopmdm.analysis.plots.style import interval_band, of_rows, reach

METRIC_STYLE = {
    "clue_conflicts": {
        "color": "#9ecae1",
        "marker": "v",
        "linestyle": ":",
        "label": "conflicts with clues (pairs)",
    },
    "guess_conflicts": {
        "color": "#4292c6",
        "marker": "s",
        "linestyle": "--",
        "label": "conflicts among guesses (pairs)",
    },
    "wrong": {"color": "#08306b", "marker": "o", "linestyle": "-", "label": "wrong cells"},
    "plausible_invalid": {
        "color": "#e08214",
        "marker": "^",
        "linestyle": "-.",
        "label": "boards: no conflict with clues, invalid",
    },
}
CHANGE_STYLE = {
    "repaired": {"color": "#08306b", "marker": "o", "linestyle": "-", "label": "wrong before, right after"},
    "broken": {"color": "#e08214", "marker": "^", "linestyle": "--", "label": "right before, wrong after"},
}


@of_rows
def plot_metrics(df: pd.DataFrame, looks: dict, *, ax: Axes | None = None) -> Axes:
    """Some metrics of boards over loops, means over seeds; `df`: loop metric mean low high."""
    ax = ax or plt.gca()
    for metric, look in looks.items():
        part = df[df["metric"] == metric].drop_duplicates("loop").sort_values("loop")
        interval_band(ax, part["loop"] + 1, part, "mean", **look)
    ax.set(xlabel="loop (1 = first)", ylabel="share", ylim=(0, None))
    return ax


@of_rows
def plot_orders(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Solve rates by generation order at the fewest and the most loops; a mark a model, bars its 95%.

    `df`: model order n_loops solve_rate low high.
    """
    ax = ax or plt.gca()
    orders = list(dict.fromkeys(df["order"]))
    counts = sorted(df["n_loops"].unique())
    looks = {counts[0]: ("#8c8c8c", "s"), counts[-1]: ("#1b4f8f", "o")}
    models = list(dict.fromkeys(df["model"]))
    for side, count in enumerate((counts[0], counts[-1])):
        part = df[df["n_loops"] == count]
        colour, marker = looks[count]
        for number, model in enumerate(models):
            own = part[part["model"] == model].set_index("order").loc[orders]
            place = np.arange(len(orders)) + (side - 0.5) * 0.34 + 0.05 * (number - (len(models) - 1) / 2)
            ax.errorbar(
                place,
                own["solve_rate"],
                yerr=reach(own, "solve_rate"),
                linestyle="none",
                marker=marker,
                color=colour,
                linewidth=0.8,
                label=f"S = {count}" if not number else None,
            )
    ax.set_xticks(range(len(orders)), orders)
    ax.set(ylabel="puzzles solved", ylim=(-0.02, 1.02))
    return ax


SHOWN_LOOPS, MOST_HOPS = (1, 2, 3, 4, 6, 8, 12, 16), 12
NEAR = 1.01
"""Rounds whose divergence is within this factor of the least are not told apart."""


@of_rows
def plot_excess(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Excess KL (thousandths of a nat) as a heat map, hops x loop, after the base model's column.

    `df`: rows of one task: arm n_loops hops and the `mean` over seeds.
    """
    ax = ax or plt.gca()
    df = df.loc[df["n_loops"].isin(SHOWN_LOOPS) & (df["hops"] <= MOST_HOPS)]
    df = df.drop_duplicates(["arm", "n_loops", "hops"])
    looped = df[df["arm"] == "loop"].pivot(index="hops", columns="n_loops", values="mean")
    base = df[(df["arm"] == "base") & (df["n_loops"] == 1)].set_index("hops")["mean"]
    looped.insert(0, 0, base)
    _heat(ax, 1e3 * looped, "base", "KL(exact || read-out), nats / 1000")
    ax.set(xlabel="n_loops (S)", ylabel="hops (rounds until all is heard)")
    return ax


@of_rows
def plot_rounds(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """KL between the belief after each round and the read-out after each loop; frames mark each loop's nearest.

    `df`: rows of one model and mask ratio: loop round kl.
    """
    ax = ax or plt.gca()
    table = 1e3 * df.pivot(index="round", columns="loop", values="kl")
    table.columns = table.columns + 1
    _heat(ax, table, "", "KL(belief || read-out), nats / 1000")
    near = table.to_numpy() <= NEAR * table.to_numpy().min(axis=0)
    for row, column in np.argwhere(near):
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d95f02", linewidth=1.3))
    ax.set(xlabel="loop (1 = first)", ylabel="round of belief propagation")
    return ax


def _heat(ax: Axes, table: pd.DataFrame, first: str, label: str) -> None:
    """Positive numbers on a logarithmic grey scale, written into their cells."""
    values = table.to_numpy(dtype=float)
    image = ax.imshow(values, cmap="Greys", norm=LogNorm(np.nanmin(values), np.nanmax(values)), aspect="auto")
    middle = np.sqrt(np.nanmin(values) * np.nanmax(values))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            ax.text(column, row, text, ha="center", va="center", fontsize=5.6,
                    color="white" if value > middle else "black")  # fmt: skip
    ax.set_xticks(range(table.shape[1]), [first if first and not n else str(n) for n in table.columns])
    ax.set_yticks(range(table.shape[0]), [str(n) for n in table.index])
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, label=label)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
