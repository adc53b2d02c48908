"""Plots of loop-wise change and of what each loop would answer."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from loopmdm.analysis.plots.style import (
    CLEAN,
    LOOP,
    MASKED,
    NULL,
    RATIO_STYLE,
    interval_band,
    of_rows,
    plainly,
    reach,
    style,
)


@of_rows
def plot_metric_by_loop(df: pd.DataFrame, metric: str, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """One metric over loops, a line a mask ratio, 95% intervals.

    `df`: rows of one model and token group with loop nominal_mask_ratio metric value low high.
    """
    ax = ax or plt.gca()
    for ratio, look in RATIO_STYLE.items():
        part = df[np.isclose(df["nominal_mask_ratio"], ratio) & (df["metric"] == metric)].sort_values("loop")
        interval_band(ax, part["loop"], part, "value", **{"label": f"{ratio:.0%} masked"} | look | kws)
    ax.set(xlabel=LOOP)
    return ax


@of_rows
def plot_drift_null(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """The 1/i that a constant drift would give, as a dotted line; `df`: loop metric value."""
    ax = ax or plt.gca()
    null = df[df["metric"] == "drift_null"].drop_duplicates("loop").sort_values("loop")
    ax.plot(null["loop"], null["value"], **{"label": "constant drift (1/i)"} | NULL | kws)
    return ax


@of_rows
def plot_read_loops(
    df: pd.DataFrame, *, sequence: int = 0, masked_only: bool = True, ax: Axes | None = None, **kws: Any
) -> Axes:
    """Positions x loops: best token in each cell, shade = p(true), changes of the best token outlined.

    Positions are named in the colours of masked and clean; `kws` go to `imshow`.
    """
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
        image = ax.imshow(shade, **{"cmap": "Greys", "vmin": 0, "vmax": 1, "aspect": "auto"} | kws)
        for (row, column), word in np.ndenumerate(words.to_numpy()):
            colour = "white" if shade.iat[row, column] > 0.55 else "black"
            ax.text(column, row, plainly(repr(word)[1:-1]), ha="center", va="center", fontsize=6.5, color=colour)
            if flips[row, column]:
                ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d95f02", lw=1.6))
        ax.set_xticks(range(shade.shape[1]), [str(loop) for loop in shade.columns])
        ax.set_yticks(range(len(truth)), [plainly(f"{position}: {word!r}") for position, word in truth.items()])
        hidden = part.drop_duplicates("position").set_index("position")["masked"]
        for tick, position in zip(ax.get_yticklabels(), truth.index, strict=True):
            tick.set_color(MASKED if hidden[position] else CLEAN)
        ax.grid(False)
        ax.set(xlabel=f"after {LOOP}", ylabel="position: true token")
        ax.figure.colorbar(image, ax=ax, label="p(true token) (share)")
    return ax


LENS_STYLE = {
    "": {"color": "#1b4f8f", "marker": "o", "linestyle": "-", "label": "through the coda"},
    "direct_": {"color": "#e08214", "marker": "^", "linestyle": "--", "label": "direct unembedding"},
}


@of_rows
def plot_lenses(df: pd.DataFrame, metric: str, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """One metric of the read-outs by both lenses; `df`: loop metric value low high at one mask ratio."""
    ax = ax or plt.gca()
    for prefix, look in LENS_STYLE.items():
        part = df[df["metric"] == f"{prefix}{metric}"].sort_values("loop")
        interval_band(ax, part["loop"], part, "value", **look | kws)
    ax.set(xlabel=LOOP)
    return ax


UNLIKE = (1e-3, 1.0)
"""1 - CKA at the ends of the scale."""


@of_rows
def plot_similarity(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """CKA of the states after every two loops as a heat map; `df`: loop other_loop value; loop -1: prelude.

    The scale is logarithmic in 1 - CKA, for states that are nearly alike; `kws` go to `imshow`.
    """
    ax = ax or plt.gca()
    table = df.pivot(index="loop", columns="other_loop", values="value")
    image = ax.imshow((1 - table).clip(*UNLIKE), **{"cmap": "Greys_r", "norm": LogNorm(*UNLIKE)} | kws)
    labels = ["in" if loop < 0 else str(loop) for loop in table.index]
    for row, column in ((i, j) for i in range(len(table)) for j in range(i)):
        value = float(table.iat[row, column])
        ax.text(column, row, "1" if value > 0.995 else f"{value:.2f}"[1:], ha="center", va="center", fontsize=5,
                color="white" if value > 0.97 else "black")  # fmt: skip
    ax.set_xticks(range(len(labels)), labels)
    ax.set_yticks(range(len(labels)), labels)
    ax.grid(False)
    ax.set(xlabel=f"after {LOOP}; in: before", ylabel="after loop")
    bar = ax.figure.colorbar(image, ax=ax, label="CKA (debiased; logarithmic in 1 − CKA)", shrink=0.85)
    bar.set_ticks([1e-3, 1e-2, 0.1, 1], labels=["0.999", "0.99", "0.9", "0"])
    bar.ax.minorticks_off()
    return ax


@of_rows
def plot_far_out(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Slopes of log change against log loop, a mark a model; `df`: model metric value low high.

    `low` and `high` bound the slope at 95%; 0 and -1 are what a constant drift gives.
    """
    ax = ax or plt.gca()
    models = list(dict.fromkeys(df["model"]))
    looks = {
        "step_norm": ("#1b4f8f", "o", "length of a step"),
        "relative_change": ("#e08214", "^", "relative change"),
    }
    for side, (metric, (colour, marker, label)) in enumerate(looks.items()):
        part = df[df["metric"] == metric].set_index("model").reindex(models)
        place = np.arange(len(models)) + 0.22 * (side - 0.5)
        look = {"linestyle": "none", "color": colour, "marker": marker, "linewidth": 0.9, "label": label}
        ax.errorbar(part["value"], place, xerr=reach(part, "value"), **look | kws)
        ax.axvline(0 if metric == "step_norm" else -1, **NULL | {"color": colour})
    ax.set_yticks(range(len(models)), models)
    ax.set(
        xlabel="slope of log change against log loop\n(dotted: a constant drift)",
        ylabel="model",
        ylim=(len(models) - 0.5, -0.5),
    )
    return ax


@of_rows
def plot_state_paths(df: pd.DataFrame, *, n_paths: int = 12, ax: Axes | None = None, **kws: Any) -> Axes:
    """Paths of some sequences' mean states in PCA coordinates: hollow what enters, the darker the later the loop.

    `df`: rows of one model and token group: sequence loop pc1 pc2 explained1 explained2; `kws` go to the points.
    """
    ax = ax or plt.gca()
    chosen = df[df["sequence"].isin(sorted(df["sequence"].unique())[:n_paths])]
    for _, part in chosen.groupby("sequence"):
        part = part.sort_values("loop")
        ax.plot(part["pc1"], part["pc2"], color="#bbbbbb", linewidth=0.7, zorder=1)
    last = int(chosen["loop"].max())
    for loop, part in chosen.groupby("loop"):
        number = int(loop)  # type: ignore[call-overload]
        shade = "white" if number < 0 else plt.get_cmap("Blues")(0.25 + 0.75 * number / max(1, last))
        name = "enters the first loop" if number < 0 else f"after loop {number}"
        look = {"s": 16, "facecolor": shade, "edgecolor": "#08306b", "linewidth": 0.5, "label": name, "zorder": 2}
        ax.scatter(part["pc1"], part["pc2"], **look | kws)
    first, second = df["explained1"].iloc[0], df["explained2"].iloc[0]
    ax.set(xlabel=f"PC 1 ({first:.0%} of variance)", ylabel=f"PC 2 ({second:.0%} of variance)")
    return ax
