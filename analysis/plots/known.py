"""Plots of tasks whose answer is known: Sudoku boards by loop, and generation orders."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator

from loopmdm.analysis.plots.style import (
    ARM_STYLE,
    CUT_STYLE,
    LOOP,
    NULL,
    RUN,
    interval_band,
    mark_s_max,
    of_rows,
    reach,
)

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
def plot_metrics(df: pd.DataFrame, looks: dict, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Some metrics of boards over loops, means over seeds; `df`: loop metric mean low high."""
    ax = ax or plt.gca()
    for metric, look in looks.items():
        part = df[df["metric"] == metric].drop_duplicates("loop").sort_values("loop")
        interval_band(ax, part["loop"], part, "mean", **look | kws)
    ax.set(xlabel=f"after {LOOP}", ylabel="share", ylim=(0, None))
    return ax


@of_rows
def plot_orders(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
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
            look = {"linestyle": "none", "marker": marker, "color": colour, "linewidth": 0.8}
            look |= {"label": f"S = {count}" if not number else None}
            ax.errorbar(place, own["solve_rate"], yerr=reach(own, "solve_rate"), **look | kws)
    ax.set_xticks(range(len(orders)), orders)
    ax.set(xlabel="order of generation", ylabel="puzzles solved (share)", ylim=(-0.02, 1.02))
    return ax


SHOWN_LOOPS, MOST_HOPS = (1, 2, 3, 4, 6, 8, 12, 16), 12
NEAR = 1.01
"""Rounds whose divergence is within this factor of the least are not told apart."""


@of_rows
def plot_excess(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Excess KL (thousandths of a nat) as a heat map, hops x loops run, after the base model's column.

    `df`: rows of one task: arm n_loops hops and the `mean` over seeds. Numbers: base, one loop, and the best S.
    `kws` go to `imshow`.
    """
    ax = ax or plt.gca()
    df = df.loc[df["n_loops"].isin(SHOWN_LOOPS) & (df["hops"] <= MOST_HOPS)]
    df = df.drop_duplicates(["arm", "n_loops", "hops"])
    looped = df[df["arm"] == "loop"].pivot(index="hops", columns="n_loops", values="mean")
    base = df[(df["arm"] == "base") & (df["n_loops"] == 1)].set_index("hops")["mean"]
    best = 1 + int(np.nanargmin(looped.sum().to_numpy()))
    looped.insert(0, 0, base)
    _heat(ax, 1e3 * looped, {0, 1, best}, "KL(exact || read-out)\n(nats / 1000, log scale)", **kws)
    ax.set_xticks(range(looped.shape[1]), ["base", *map(str, looped.columns[1:])])
    ax.axvline(0.5, color="white", linewidth=3)
    ax.set(xlabel=RUN, ylabel="hops (rounds until all is heard)")
    return ax


@of_rows
def plot_steps(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Excess KL (nats) by steps of evaluation, a line a number of loops run, other arms beside them.

    `df`: rows of one task: arm n_loops hops n_nodes and the `mean` over seeds with low high; steps that fewer than
    `FEWEST` hidden values take are left out.
    """
    ax = ax or plt.gca()
    df = df[df["n_loops"].isin(SHOWN_LOOPS) & (df["n_nodes"] >= FEWEST)].sort_values("hops")
    df = df.drop_duplicates(["arm", "n_loops", "hops"])
    counts = [count for count in SHOWN_LOOPS if count in set(df.loc[df["arm"] == "loop", "n_loops"])]
    shades = plt.get_cmap("Blues")(np.linspace(0.35, 1.0, len(counts)))
    marks = dict(zip(counts, zip(shades, "os^DvP<>", strict=False), strict=True))
    for (arm, count), part in df.groupby(["arm", "n_loops"]):
        if arm == "loop":
            colour, marker = marks[count]
            look = {"color": colour, "marker": marker, "linestyle": "-", "label": f"loop, S = {count}"}
        else:
            look = ARM_STYLE[str(arm)] | {"label": arm}
        interval_band(ax, part["hops"], part, "mean", **look | kws)
    return _over_steps(ax, df)


@of_rows
def plot_cuts(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Excess KL (nats) by steps of evaluation with edges cut; `df`: edges n_loops hops n_nodes mean low high."""
    ax = ax or plt.gca()
    df = df[df["n_nodes"] >= FEWEST].drop_duplicates(["edges", "n_loops", "hops"]).sort_values("hops")
    for (edges, looped), look in CUT_STYLE.items():
        part = df[(df["edges"] == edges) & ((df["n_loops"] > 1) == looped)]
        interval_band(ax, part["hops"], part, "mean", **look | kws)
    return _over_steps(ax, df)


def _over_steps(ax: Axes, df: pd.DataFrame) -> Axes:
    ax.set(xlabel="steps of evaluation that a hidden value takes", ylabel="KL(exact || read-out) (nats)")
    ax.set_xticks(sorted(df["hops"].unique()))
    return ax


FEWEST = 20
"""Hidden values over which a mean by steps is drawn."""


@of_rows
def plot_reach(df: pd.DataFrame, s_max: int, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """How many steps of evaluation are in reach, by loops run; a line a seed, arms without loops as levels.

    `df`: arm seed n_loops steps and its `mean` over seeds. Dots: one step a loop from what one loop reaches.
    """
    ax = ax or plt.gca()
    for arm in [name for name in ARM_STYLE if name in set(df["arm"])]:
        part, n = df[df["arm"] == arm].sort_values("n_loops"), df.loc[df["arm"] == arm, "seed"].nunique()
        look = ARM_STYLE[arm] | {"label": f"{arm} ({n} seed{'s' if n > 1 else ''})"} | kws
        for number, (_, own) in enumerate(part.groupby("seed")):
            look |= {} if not number else {"label": None}
            if arm == "loop":
                ax.plot(own["n_loops"], own["steps"], **look)
            else:
                ax.axhline(own["steps"].iloc[0], **look | {"marker": ""})
    looped = df[df["arm"] == "loop"].sort_values("n_loops")
    counts = looped["n_loops"].unique()
    ax.plot(counts, looped["mean"].iloc[0] + counts - counts[0], **NULL)
    mark_s_max(ax, s_max, int(counts[-1]))
    ax.set(xlabel=RUN, ylabel="steps of evaluation in reach")
    return ax


@of_rows
def plot_rounds(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """KL between the belief after each round and the read-out after each loop; boxes: each loop's nearest rounds.

    `df`: rows of one model and mask ratio: loop round kl. Numbers: the least of each loop.
    `kws` go to `imshow`.
    """
    ax = ax or plt.gca()
    table = 1e3 * df.pivot(index="round", columns="loop", values="kl")
    values = table.to_numpy(dtype=float)
    _heat(ax, table, set(), "KL(belief || read-out)\n(nats / 1000, log scale)", **kws)
    near = values <= NEAR * values.min(axis=0)
    for column, rows in enumerate(near.T):
        first, last = np.flatnonzero(rows)[[0, -1]]
        box = {"fill": False, "edgecolor": "#d95f02", "linewidth": 1.6, "zorder": 3}
        ax.add_patch(Rectangle((column - 0.44, first - 0.44), 0.88, last - first + 0.88, **box))
        ax.text(
            column, (first + last) / 2, f"{values[:, column].min():.0f}", ha="center", va="center", fontsize=6.5
        )
    ax.set(xlabel=LOOP, ylabel="round of belief propagation")
    return ax


def round_handles() -> list[Patch]:
    """A legend for `plot_rounds`."""
    label = f"rounds nearest to that loop (within {NEAR - 1:.0%} of the least KL, the number inside)"
    return [Patch(facecolor="none", edgecolor="#d95f02", linewidth=1.6, label=label)]


def _heat(ax: Axes, table: pd.DataFrame, written: set[int], label: str, **kws: Any) -> None:
    """Positive numbers on a logarithmic grey scale; those of the columns `written` stand in their cells."""
    values = table.to_numpy(dtype=float)
    look = {"cmap": "Greys", "norm": LogNorm(np.nanmin(values), np.nanmax(values)), "aspect": "auto"}
    image = ax.imshow(values, **look | kws)
    middle = np.sqrt(np.nanmin(values) * np.nanmax(values))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value) and column in written:
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            ax.text(column, row, text, ha="center", va="center", fontsize=6.2,
                    color="white" if value > middle else "black")  # fmt: skip
    ax.set_xticks(range(table.shape[1]), [str(n) for n in table.columns])
    ax.set_yticks(range(table.shape[0]), [str(n) for n in table.index])
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, label=label)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.minorticks_off()
