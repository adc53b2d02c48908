"""Plots of loop-wise change and of what each loop would answer."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from analysis.plots.style import NULL, RATIO_STYLE, Z95, band, style


def plot_metric_by_loop(df: pd.DataFrame, metric: str, *, ax: Axes | None = None) -> Axes:
    """One metric over loops, a line a mask ratio, 95% intervals.

    `df`: rows of one model and token group with loop nominal_mask_ratio metric value standard_error.
    """
    ax = ax or plt.gca()
    for ratio, look in RATIO_STYLE.items():
        part = df[np.isclose(df["nominal_mask_ratio"], ratio) & (df["metric"] == metric)].sort_values("loop")
        low, high = part["value"] - Z95 * part["standard_error"], part["value"] + Z95 * part["standard_error"]
        band(ax, part["loop"] + 1, part["value"], low, high, label=f"{ratio:.0%} masked", **look)
    ax.set(xlabel="loop (1 = first)")
    return ax


def plot_drift_null(df: pd.DataFrame, *, ax: Axes) -> Axes:
    """The 1/i that a constant drift would give, as a dotted line."""
    null = df[df["metric"] == "drift_null"].drop_duplicates("loop").sort_values("loop")
    ax.plot(null["loop"] + 1, null["value"], label="constant drift (1/i)", **NULL)
    return ax


def plot_read_loops(
    df: pd.DataFrame, *, sequence: int = 0, masked_only: bool = True, ax: Axes | None = None
) -> Axes:
    """Positions x loops: best token in each cell, shade = p(true), changes of the best token outlined."""
    part = pd.DataFrame(df[df["sequence"] == sequence])
    part = part[part["masked"]] if masked_only else part
    shade = part.pivot(index="position", columns="loop", values="p_true")
    words = part.pivot(index="position", columns="loop", values="top1")
    flips = part.pivot(index="position", columns="loop", values="flipped").to_numpy()
    truth = part.drop_duplicates("position").set_index("position")["true"]
    with style():
        if ax is None:
            size = (0.75 * shade.shape[1] + 1.9, 0.2 * shade.shape[0] + 0.9)
            ax = plt.subplots(figsize=size, layout="constrained")[1]
        image = ax.imshow(shade, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for (row, column), word in np.ndenumerate(words.to_numpy()):
            colour = "white" if shade.iat[row, column] > 0.55 else "black"
            ax.text(column, row, repr(word)[1:-1], ha="center", va="center", fontsize=6.5, color=colour)
            if flips[row, column]:
                ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d95f02", lw=1.6))
        ax.set_xticks(range(shade.shape[1]), [str(loop + 1) for loop in shade.columns])
        ax.set_yticks(range(len(truth)), [f"{position}: {word!r}" for position, word in truth.items()])
        ax.grid(False)
        ax.set(xlabel="loop (1 = first)", ylabel="position: true token")
        ax.figure.colorbar(image, ax=ax, label="p(true token)")
    return ax
