"""Plots of sparse dictionaries over loops: what they keep, and when their features live."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from loopmdm.analysis.plots.style import LOOP, of_rows

ARM_STYLE = {
    "trained": {"color": "#1b4f8f", "marker": "o", "linestyle": "-"},
    "untrained": {"color": "#8c8c8c", "marker": "s", "linestyle": "--"},
}
KIND_STYLE = {
    "crosscoder": {"color": "#1b4f8f", "marker": "o", "linestyle": "-"},
    "sae": {"color": "#e08214", "marker": "^", "linestyle": "-."},
}
LIFE_STYLE = {
    "born": {"color": "#08306b", "hatch": "", "label": "first loop"},
    "last": {"color": "#e08214", "hatch": "///", "label": "last loop"},
}


@of_rows
def plot_recovered(
    df: pd.DataFrame, metric: str = "loss_recovered", by: str = "arm", *, ax: Axes | None = None, **kws: Any
) -> Axes:
    """A share by loop, an arm or kind a line (`by`), bars one standard error.

    `df`: arm kind loop metric value standard_error.
    """
    ax = ax or plt.gca()
    chosen = df[(df["metric"] == metric) & df["loop"].notna()]
    looks = KIND_STYLE if by == "kind" else ARM_STYLE
    for name, part in chosen.groupby(by, sort=False):
        part = part.sort_values("loop")
        look = looks.get(str(name), ARM_STYLE["trained"])
        label = str(name) if by == "kind" else f"{name} model"
        place = part["loop"].to_numpy(dtype=int)
        ax.errorbar(
            place,
            part["value"],
            yerr=part["standard_error"],
            **{"label": label, "capsize": 2} | look | kws,
        )
    ax.set(xlabel=LOOP, ylabel=metric.replace("_", " "))
    ax.set_xticks(sorted(set(chosen["loop"].to_numpy(dtype=int))))
    return ax


@of_rows
def plot_lives(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Shares of live features by the first and the last loop of their lives; `df`: rows of one arm, as above."""
    ax = ax or plt.gca()
    for side, (metric, look) in enumerate(LIFE_STYLE.items()):
        part = df[(df["metric"] == metric) & df["loop"].notna()].sort_values("loop")
        place = part["loop"].to_numpy(dtype=int) + (side - 0.5) * 0.36
        ax.bar(place, part["value"], width=0.34, yerr=part["standard_error"], edgecolor="white", **look | kws)
    ax.set(xlabel=LOOP, ylabel="live features (share)", ylim=(0, None))
    ax.set_xticks(sorted(set(df["loop"].dropna().to_numpy(dtype=int))))
    return ax


@of_rows
def plot_profiles(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Features x loops in grey, by loop of the largest profile; `df`: feature loop profile (over its largest)."""
    ax = ax or plt.gca()
    table = df.pivot(index="feature", columns="loop", values="profile")
    table = table.iloc[table.to_numpy().argmax(axis=1).argsort(kind="stable")]
    image = ax.imshow(
        table.to_numpy(dtype=float), **{"cmap": "Greys", "vmin": 0, "vmax": 1, "aspect": "auto"} | kws
    )
    ax.set_xticks(range(table.shape[1]), [str(int(loop)) for loop in table.columns])
    ax.set(xlabel=LOOP, ylabel="feature, by loop of its largest")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label="profile (share of its largest)")
    return ax
