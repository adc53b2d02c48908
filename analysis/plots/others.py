"""Plots of other people's models beside ours: attention over depth, and looping what never looped."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from loopmdm.analysis.plots.style import BLOCK_STYLE, KEY_STYLE, NULL, ODDS, SHARE_STYLE, interval_band, of_rows


@of_rows
def plot_mass_by_depth(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Mass of masked queries on masked and clean keys over layer applications, chance as dotted lines.

    `df`: rows of one model and mask ratio with depth layer segment key_group mass chance low high.
    """
    ax = ax or plt.gca()
    for group in ("masked", "clean"):
        part, look = df[df["key_group"] == group].sort_values("depth"), KEY_STYLE[group]
        interval_band(ax, part["depth"], part, "mass", **look | kws)
        ax.plot(part["depth"], part["chance"], **NULL | {"color": look["color"]})
    _mark_layers(df, ax)
    ax.set(ylabel="attention mass (share)")
    return ax


@of_rows
def plot_log_odds_by_depth(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Log-odds of masked against clean keys over layer applications, a line a mask ratio; 0 = indifferent.

    `df`: rows of one model with depth layer segment nominal_mask_ratio log_odds low high.
    """
    ax = ax or plt.gca()
    for ratio, look in SHARE_STYLE.items():
        part = df[np.isclose(df["nominal_mask_ratio"], ratio)].sort_values("depth")
        if len(part):
            interval_band(ax, part["depth"], part, "log_odds", **look | kws)
    ax.axhline(0, **NULL)
    _mark_layers(df, ax)
    ax.set(ylabel=ODDS)
    return ax


def _mark_layers(df: pd.DataFrame, ax: Axes) -> None:
    """Layers as ticks; applications of looped ones on grey, the loop beneath their layer."""
    places = df.drop_duplicates("depth").sort_values("depth")
    looped = places[places["segment"] == "loop"]
    if len(looped) > 1:
        ax.axvspan(looped["depth"].min() - 0.5, looped["depth"].max() + 0.5, color="#eeeeee", zorder=0)
    once = len(looped) <= 1
    names = [str(row.layer) if once or pd.isna(row.loop) else f"{row.layer}\n{row.loop}"
             for row in places.itertuples()]  # fmt: skip
    ax.set_xticks(places["depth"], names)
    ax.set_xlim(places["depth"].min() - 0.5, places["depth"].max() + 0.5)
    ax.grid(False, axis="x")


@of_rows
def plot_by_block(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """A number over n_loops, a line a block of repeated layers, in the order of the rows.

    `df`: rows of one model and damping with block n_loops value low high.
    """
    ax = ax or plt.gca()
    for block, look in zip(dict.fromkeys(df["block"]), BLOCK_STYLE, strict=False):
        part = df[df["block"] == block].sort_values("n_loops")
        interval_band(ax, part["n_loops"], part, "value", **{"label": block} | look | kws)
    ax.axhline(0, **NULL)
    ax.set_xticks(sorted(df["n_loops"].unique()))
    return ax
