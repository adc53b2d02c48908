"""Plots of interventions, of the trained 2 x 2 and of looping without training."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from loopmdm.analysis.plots.style import LOOP, NULL, RUN, interval_band, of_rows, reach, root_norm

DAMPING_STYLE = {
    "none": {"color": "#8c8c8c", "marker": "s", "linestyle": "--", "label": "full steps"},
    "1/n_loops": {"color": "#1b4f8f", "marker": "o", "linestyle": "-", "label": "damped by 1/S"},
}
ARMS_CUT = (
    ("masked->masked", False, "cut masked → masked"),
    ("masked->masked", True, "random, equal mass\nand distance"),
    ("masked->clean", False, "cut masked → clean"),
    ("stale", False, "values of first loop\nat masked keys"),
)

KIND_STYLE = {
    "cut": {"color": "#1b4f8f", "marker": "o", "label": "cut"},
    "resample": {"color": "#e08214", "marker": "^", "label": "another sequence's values"},
    "mean": {"color": "#8c8c8c", "marker": "s", "label": "mean of others' values"},
}
"""What is done to edges."""


@of_rows
def plot_shares(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Share of the gain of looping that is lost, one mark a model; `df`: edges matched share low high.

    A model without a gain has no share and no mark. The axis is linear to 2 and logarithmic beyond, on grey.
    """
    ax = ax or plt.gca()
    models = list(dict.fromkeys(df["model"]))
    for number, model in enumerate(models):
        part = df[df["model"] == model].set_index(["edges", "matched"])
        part = part.reindex(pd.MultiIndex.from_tuples([cut[:2] for cut in ARMS_CUT]))
        place = np.arange(len(ARMS_CUT)) + 0.13 * (number - (len(models) - 1) / 2)
        look = {
            "linestyle": "none",
            "marker": SEED_MARKERS[number % len(SEED_MARKERS)],
            "color": plt.get_cmap("Blues")(0.4 + 0.55 * number / max(1, len(models) - 1)),
            "linewidth": 0.9,
            "label": f"seed {number}",
        }
        ax.errorbar(part["share"], place, xerr=reach(part, "share"), **look | kws)
    ax.axvline(0, **NULL)
    ax.axvline(1, **NULL)
    ax.set_yticks(range(len(ARMS_CUT)), [label for *_, label in ARMS_CUT])
    ax.set_xscale("symlog", linthresh=2)
    ax.set_xticks(
        [-2, -1, 0, 1, 2, 5, 10, 20, 50], ["-2", "-1", "0", "1", "2", "5", "10", "20", "50"], minor=False
    )
    ax.set_xticks([], minor=True)
    ax.add_artist(Rectangle((2, 0), 1e4, 1, transform=ax.get_xaxis_transform(), color="#eeeeee", zorder=0))
    ax.set(xlabel="gain of looping that is lost (share;\nlinear to 2, logarithmic on grey)")
    ax.set(ylabel="what is done", ylim=(len(ARMS_CUT) - 0.5, -0.5))
    return ax


SEED_MARKERS = "os^Dv"


@of_rows
def plot_effects(df: pd.DataFrame, *, most: float | None = None, ax: Axes | None = None, **kws: Any) -> Axes:
    """Heat map loop x mask ratio of an effect, thousandths of a nat; pale numbers where its interval holds 0.

    `df`: rows of one model: loop mask_ratio effect low high. The scale is a square root, from -`most` to `most`
    (the largest effect if it is not given); `kws` go to `imshow`.
    """
    ax = ax or plt.gca()
    table, low, high = (
        1e3 * df.pivot(index="mask_ratio", columns="loop", values=name).sort_index(ascending=False)
        for name in ("effect", "low", "high")
    )
    most = float(np.nanmax(np.abs(table.to_numpy()))) if most is None else most
    ax.imshow(table, **{"cmap": "PuOr_r", "norm": root_norm(most, signed=True), "aspect": "auto"} | kws)
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        sure = low.iat[row, column] > 0 or high.iat[row, column] < 0
        colour = "white" if abs(value) > 0.36 * most else "black"
        shown = f"{round(value)}"  # no -0
        text = shown if sure else f"({shown})"
        ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour if sure else "#777777")
    ax.set_xticks(range(table.shape[1]), [str(loop) for loop in table.columns])
    ax.set_yticks(range(table.shape[0]), [f"{ratio:.0%}" for ratio in table.index])
    ax.grid(False)
    ax.set(xlabel=LOOP, ylabel="masked (middle of bin)")
    return ax


@of_rows
def plot_edges(
    df: pd.DataFrame, by: str, labels: dict[str, str], level: float, *, ax: Axes | None = None, **kws: Any
) -> Axes:
    """Nats that edges cost, a row for each value of the column `by` in `labels`, one mark a model and kind.

    `df`: model kind effect low high, and `by`; `level` is where the dashed line goes: what all loops are worth.
    """
    ax = ax or plt.gca()
    for number, (kind, look) in enumerate(KIND_STYLE.items()):
        part = df[(df["kind"] == kind) & df[by].isin(labels)]
        row = part[by].map({value: row for row, value in enumerate(labels)})
        seed = part.groupby(by, sort=False).cumcount() - (part["model"].nunique() - 1) / 2
        place = row + 0.26 * (number - 1) + 0.045 * seed
        ax.errorbar(part["effect"], place, xerr=reach(part, "effect"), linestyle="none", markersize=2.6,
                    **{"linewidth": 0.6} | look | kws)  # fmt: skip
    ax.axvline(0, **NULL)
    ax.axvline(level, color="black", linewidth=0.9, linestyle="--")
    ax.set_yticks(range(len(labels)), list(labels.values()))
    ax.set(ylabel="edges", xlabel="NELBO lost (nats per token)", ylim=(len(labels) - 0.5, -0.5))
    return ax


@of_rows
def plot_dose(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Nats lost over the share of edges, a line a kind, a thin one a model; `df`: model kind share effect mean."""
    ax = ax or plt.gca()
    for kind, look in KIND_STYLE.items():
        part = df[df["kind"] == kind]
        table = part.pivot(index="share", columns="model", values="effect")
        table["mean"] = part.drop_duplicates("share").set_index("share")["mean"]
        table.loc[0.0] = 0.0
        table = table.sort_index()
        ax.plot(table.index, table.drop(columns="mean"), color=look["color"], linewidth=0.4, alpha=0.6)
        ax.plot(table.index, table["mean"], **look | kws)
    ax.set(xlabel="edges taken (share)", ylabel="NELBO lost\n(nats per token)", xlim=(0, 1))
    return ax


@of_rows
def plot_training_free(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """A column of `training-free` over n_loops, naive and damped; `df`: damping n_loops mean low high."""
    ax = ax or plt.gca()
    for damping, look in DAMPING_STYLE.items():
        part = df[df["damping"] == damping].drop_duplicates("n_loops").sort_values("n_loops")
        interval_band(ax, part["n_loops"], part, "mean", **look | kws)
    ax.axhline(0, **NULL)
    ax.set(xlabel=RUN)
    return ax
