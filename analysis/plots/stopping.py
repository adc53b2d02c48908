"""Plots of adaptive stopping."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from loopmdm.analysis.plots.style import NULL, interval_band, of_rows, reach

RULE_STYLE = {
    "fixed": {"color": "#444444", "marker": "s", "linestyle": "--", "label": "fixed S"},
    "noise-schedule": {"color": "#e08214", "marker": "^", "linestyle": "-.", "label": "schedule by mask ratio"},
    "state-delta": {"color": "#1b4f8f", "marker": "o", "linestyle": "-", "label": "state-delta"},
    "kl-delta": {"color": "#9ecae1", "marker": "v", "linestyle": "-", "label": "kl-delta (coda)"},
    "oracle": {"color": "#bbbbbb", "marker": ".", "linestyle": ":", "label": "oracle (sees the answer)"},
}


@of_rows
def plot_frontier(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Loss against FLOPs, a line a rule; `df`: rows of one model over all mask ratios: rule flops nll."""
    ax = ax or plt.gca()
    for rule, look in RULE_STYLE.items():
        part = df[df["rule"] == rule].sort_values("flops")
        ax.plot(part["flops"] / 1e6, part["nll"], **{"markersize": 2.4} | look | kws)
    fixed = df[df["rule"] == "fixed"]
    span = fixed["nll"].max() - fixed["nll"].min()
    ax.set_ylim(min(df["nll"].min(), fixed["nll"].min()) - 0.05 * span, fixed["nll"].max() + 0.05 * span)
    ax.set(xlabel="MFLOPs a sequence (reading included)", ylabel="NELBO (nats per masked token)")
    return ax


@of_rows
def plot_loops_by_step(df: pd.DataFrame, most: int, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Loops used before each denoising step, 95% over samples; `df`: step mask_ratio value low high."""
    ax = ax or plt.gca()
    part = df.sort_values("step")
    look = RULE_STYLE["state-delta"] | {"label": "loops used"}
    interval_band(ax, part["step"] + 1, part, "value", **look | kws)
    ax.axhline(most, **NULL)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="denoising step (1 = first)", ylabel="loops used", ylim=(0, most + 0.5))
    return ax


@of_rows
def plot_usage(df: pd.DataFrame, most: int, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Loops used by group, both scopes; `df`: rows of one model: scope by group value low high."""
    ax = ax or plt.gca()
    df = df.loc[df["by"] != "all"]
    groups = list(dict.fromkeys(zip(df["by"], df["group"], strict=True)))
    looks = {"sequence": ("#1b4f8f", "o"), "token": ("#e08214", "^")}
    for side, (scope, (colour, marker)) in enumerate(looks.items()):
        part = df[df["scope"] == scope].set_index(["by", "group"]).reindex(pd.MultiIndex.from_tuples(groups))
        place = np.arange(len(groups)) + 0.22 * (side - 0.5)
        look = {"linestyle": "none", "marker": marker, "linewidth": 0.9}
        look |= {"color": colour, "label": f"scope {scope}"}
        ax.errorbar(part["value"], place, xerr=reach(part, "value"), **look | kws)
    names = {"mask_ratio": lambda group: f"{float(group):.0%} masked", "difficulty": lambda group: f"{group} loss"}
    ax.set_yticks(range(len(groups)), [names.get(by, str)(group) for by, group in groups])
    ax.axvline(most, **NULL)
    ax.set(xlabel="loops used", ylabel="positions", xlim=(0, most + 0.5), ylim=(len(groups) - 0.5, -0.5))
    return ax


@of_rows
def plot_savings(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """FLOPs and time of whole sampling runs as shares of those at fixed S; `df`: label flops_ratio time_ratio."""
    ax = ax or plt.gca()
    place = np.arange(len(df))
    flops = {"height": 0.34, "color": "#9ecae1", "label": "FLOPs"}
    time = {"height": 0.34, "color": "#1b4f8f", "label": "time, two CPU cores"}
    ax.barh(place - 0.18, df["flops_ratio"], **flops | kws)
    ax.barh(place + 0.18, df["time_ratio"], **time | kws)
    ax.axvline(1, **NULL)
    ax.set_yticks(place, df["label"])
    ax.set(xlabel="FLOPs or time (share of what all loops take)", ylabel="what stops", ylim=(len(df) - 0.5, -0.5))
    return ax
