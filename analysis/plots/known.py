"""Plots of tasks whose answer is known: Sudoku boards by loop, and generation orders."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.quality import over_seeds
from analysis.plots.style import band

METRIC_STYLE = {
    "clue_conflicts": ("#9ecae1", "v", ":", "conflicts with clues (pairs)"),
    "guess_conflicts": ("#4292c6", "s", "--", "conflicts among guesses (pairs)"),
    "wrong": ("#08306b", "o", "-", "wrong cells"),
    "plausible_invalid": ("#e08214", "^", "-.", "boards: no conflict with clues, invalid"),
}
CHANGE_STYLE = {
    "repaired": ("#08306b", "o", "-", "wrong before, right after"),
    "broken": ("#e08214", "^", "--", "right before, wrong after"),
}


def plot_metrics(df: pd.DataFrame, looks: dict, *, ax: Axes | None = None) -> Axes:
    """Some metrics of boards over loops, means over seeds; `df`: model loop metric value standard_error."""
    ax = ax or plt.gca()
    for metric, (colour, marker, line, label) in looks.items():
        part = df[df["metric"] == metric].rename(columns={"standard_error": "value_se"}).dropna(subset=["value"])
        summary = over_seeds(part, "loop", "value")
        band(
            ax,
            summary["loop"] + 1,
            summary["value"],
            summary["low"],
            summary["high"],
            color=colour,
            marker=marker,
            linestyle=line,
            label=label,
        )
    ax.set(xlabel="loop (1 = first)", ylabel="share", ylim=(0, None))
    return ax


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
            error = np.abs(own[["low", "high"]].to_numpy().T - own["solve_rate"].to_numpy())
            ax.errorbar(
                place,
                own["solve_rate"],
                yerr=error,
                linestyle="none",
                marker=marker,
                color=colour,
                linewidth=0.8,
                label=f"S = {count}" if not number else None,
            )
    ax.set_xticks(range(len(orders)), orders)
    ax.set(ylabel="puzzles solved", ylim=(-0.02, 1.02))
    return ax
