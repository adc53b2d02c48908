"""Plots of attention between masked and clean positions, and of maps across loop counts."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loopmdm.analysis.plots.style import (
    AMOUNT_STYLE,
    KEY_STYLE,
    NULL,
    RATIO_STYLE,
    interval_band,
    of_rows,
    plainly,
    reach,
    style,
)


@of_rows
def plot_mass_by_loop(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Mass of masked queries on masked, clean and own key over `loop`, chance as dotted lines.

    `df`: rows of one model, layer and mask ratio with loop key_group mass low high chance.
    """
    ax = ax or plt.gca()
    for group, look in KEY_STYLE.items():
        part = df[df["key_group"] == group].sort_values("loop")
        x = part["loop"].astype(int) + 1
        interval_band(ax, x, part, "mass", **look)
        ax.plot(x, part["chance"], **NULL | {"color": look["color"]})
    ax.set(xlabel="loop (1 = first)", ylabel="attention mass", ylim=(0, None))
    return ax


@of_rows
def plot_log_odds_by_loop(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Log-odds of masked against clean keys over `loop`, a line a mask ratio; 0 = indifferent.

    `df`: rows of one model and layer with loop nominal_mask_ratio log_odds low high.
    """
    ax = ax or plt.gca()
    for ratio, look in RATIO_STYLE.items():
        part = df[np.isclose(df["nominal_mask_ratio"], ratio)].sort_values("loop")
        if part.empty:
            continue
        x = part["loop"].astype(int) + 1
        interval_band(ax, x, part, "log_odds", label=f"{ratio:.0%} masked", **look)
    ax.axhline(0, **NULL)
    ax.set(xlabel="loop (1 = first)", ylabel="log-odds masked : clean")
    return ax


def plot_other_seeds(frames: Sequence[pd.DataFrame], *, ax: Axes) -> Axes:
    """Log-odds at half masked of other training seeds, a thin line each; frames as `plot_log_odds_by_loop`'s."""
    for df in frames:
        part = df[np.isclose(df["nominal_mask_ratio"], 0.5)].sort_values("loop")
        colour = RATIO_STYLE[0.5]["color"]
        ax.plot(part["loop"].astype(int) + 1, part["log_odds"], color=colour, linewidth=0.5, zorder=1)
    return ax


@of_rows
def plot_by_s_max(df: pd.DataFrame, *, axes: Sequence[Axes]) -> None:
    """Log-odds over loops, and their rise since the first loop over loop / S_max; a line an S_max of training.

    Seeds beyond the first are thin. `df`: arm seed s_max loop log_odds low high.
    """
    for arm in [name for name in AMOUNT_STYLE if name in set(df["arm"])]:
        for seed, part in df[df["arm"] == arm].groupby("seed"):
            part, look = part.sort_values("loop"), AMOUNT_STYLE[arm] | {"markersize": 2.4}
            x, y = part["loop"].astype(int) + 1, part["log_odds"]
            rise = y - y.iloc[0]
            if seed:
                look = {"color": look["color"], "linewidth": 0.5, "zorder": 1}
                axes[0].plot(x, y, **look)
            else:
                interval_band(axes[0], x, part, "log_odds", **look)
                last = x == part["s_max"]
                axes[0].plot(x[last], y[last], marker="o", markersize=7, fillstyle="none", color=look["color"])
            axes[1].plot(x / part["s_max"], rise, **look)
    axes[0].axhline(0, **NULL)
    axes[0].set(xlabel="loop (1 = first)", ylabel="log-odds masked : clean")
    axes[1].axhline(0, **NULL)
    axes[1].axvline(1, color="#666666", linewidth=0.8, linestyle="-.", zorder=0)
    axes[1].set(xlabel="loop / $S_{max}$", ylabel="log-odds less those of the first loop")


@of_rows
def plot_log_odds_by_layer(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Log-odds of the layers outside the loop, a mark a mask ratio.

    `df`: rows of one model with segment layer nominal_mask_ratio log_odds low high.
    """
    ax = ax or plt.gca()
    layers = sorted(df["layer"].unique())
    for offset, (ratio, look) in enumerate(RATIO_STYLE.items()):
        part = df[np.isclose(df["nominal_mask_ratio"], ratio)].sort_values("layer")
        x = [layers.index(layer) + 0.18 * (offset - 1) for layer in part["layer"]]
        bars = {"color": look["color"], "marker": look["marker"], "linestyle": "none"}
        ax.errorbar(x, part["log_odds"], yerr=reach(part, "log_odds"), label=f"{ratio:.0%} masked", **bars)
    names = [df.loc[df["layer"] == layer, "segment"].iloc[0] for layer in layers]
    ax.set_xticks(
        range(len(layers)), [f"{name}\nlayer {layer}" for name, layer in zip(names, layers, strict=True)]
    )
    ax.set_xlim(-0.6, len(layers) - 0.4)
    ax.axhline(0, **NULL)
    return ax


def plot_map(weights: np.ndarray, labels: list[str], masked: np.ndarray, *, ax: Axes, **heat) -> Axes:
    """One attention map [query, key]; labels of masked positions are coloured."""
    labels = [plainly(label) for label in labels]
    sns.heatmap(weights, ax=ax, square=True, xticklabels=labels, yticklabels=labels, **heat)
    size = max(3.5, min(6.5, 160 / max(len(labels), 1)))
    ax.tick_params(axis="x", length=0, labelsize=size, rotation=90, pad=1)
    ax.tick_params(axis="y", length=0, labelsize=size, rotation=0, pad=1)
    for tick, hidden in zip([*ax.get_xticklabels(), *ax.get_yticklabels()], [*masked, *masked], strict=True):
        tick.set_color("#b35806" if hidden else "black")
    ax.set(xlabel="key", ylabel="query")
    return ax


def draw_maps(
    axes: list[Axes], maps: np.ndarray, loops: Sequence[int], labels: list[str], masked: np.ndarray
) -> None:
    """Fill axes with one map a loop on a common scale, then last minus first on its own."""
    top = float(maps.max())
    for ax, loop, weights in zip(axes, loops, maps, strict=False):
        heat = {"vmin": 0, "vmax": top, "cmap": "Greys", "cbar_kws": {"shrink": 0.6, "label": "attention"}}
        plot_map(weights, labels, masked, ax=ax, **heat)
        ax.set_title(f"loop {loop + 1}")
    change = maps[-1] - maps[0]
    limit = float(np.abs(change).max()) or 1.0
    heat = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r", "cbar_kws": {"shrink": 0.6, "label": "change"}}
    plot_map(change, labels, masked, ax=axes[len(loops)], **heat)
    axes[len(loops)].set_title(f"loop {loops[-1] + 1} − loop {loops[0] + 1}")


@runtime_checkable
class Maps(Protocol):
    """Maps of one head: `maps` [shown loop, query, key], `labels` and `masked` [query] in the shown order."""

    layer: int
    head: int
    loops: tuple[int, ...]
    maps: np.ndarray
    labels: list[str]
    masked: np.ndarray


def plot_maps(maps: Maps) -> Figure:
    """Maps of the same head side by side across loops, and last minus first."""
    n = len(maps.loops) + 1
    columns = 2 if n <= 4 else 3
    rows = -(-n // columns)
    with style():
        figure, axes = plt.subplots(
            rows, columns, figsize=(7.2, 6.6 / columns * rows), layout="constrained", squeeze=False
        )
        labels = [
            "■" if hidden else text.strip() or "␣" for text, hidden in zip(maps.labels, maps.masked, strict=True)
        ]
        draw_maps(list(axes.flat), maps.maps, maps.loops, labels, maps.masked)
        for ax in list(axes.flat)[n:]:
            ax.set_axis_off()
        figure.suptitle(f"layer {maps.layer}, head {maps.head}; ■ = [MASK]", fontsize=8)
    plt.close(figure)
    return figure


@of_rows
def plot_content_by_loop(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What the masked keys' values move into masked queries, over `loop`, a line a mask ratio.

    `df`: rows of one model and layer with loop nominal_mask_ratio content low high.
    """
    ax = ax or plt.gca()
    for ratio, look in RATIO_STYLE.items():
        part = df[np.isclose(df["nominal_mask_ratio"], ratio)].sort_values("loop")
        x = part["loop"].astype(int) + 1
        interval_band(ax, x, part, "content", label=f"{ratio:.0%} masked", **look)
    ax.set(xlabel="loop (1 = first)", ylabel="content (norm)", ylim=(0, None))
    return ax


@of_rows
def plot_by_step(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Log-odds masked : clean as a heat map, denoising step x loop; `df`: step mask_ratio loop log_odds.

    A step has one mask ratio.
    """
    ax = ax or plt.gca()
    table = df.pivot(index="step", columns="loop", values="log_odds").dropna(how="all")
    ratios = df.groupby("step")["mask_ratio"].first()
    most = float(np.nanmax(np.abs(table.to_numpy(dtype=float))))
    image = ax.imshow(table.astype(float), cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
    for (row, column), value in np.ndenumerate(table.to_numpy(dtype=float)):
        colour = "white" if abs(value) > 0.6 * most else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.2, color=colour)
    ax.set_xticks(range(table.shape[1]), [str(loop + 1) for loop in table.columns])
    ax.set_yticks(range(table.shape[0]), [f"{step + 1}: {ratios[step]:.0%}" for step in table.index])
    ax.grid(False)
    ax.set(xlabel="loop (1 = first)", ylabel="denoising step: masked")
    ax.figure.colorbar(image, ax=ax, label="log-odds masked : clean", shrink=0.9)
    return ax


@of_rows
def plot_specifications(df: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Every definition of the rise, a column a definition: estimates above in the measure's own units of error,
    choices below.

    `df`: rows of one model: measure self sinks heads nominal_mask_ratio estimate standard_error score verdict.
    """
    above, below = axes
    df = df.drop_duplicates(["measure", "nominal_mask_ratio", "estimate", "standard_error"])
    order = df.sort_values(["measure", "score"]).reset_index(drop=True)
    colours = {"rises": "#1b4f8f", "undecided": "#bbbbbb", "falls": "#e08214"}
    markers = {"rises": "^", "undecided": "o", "falls": "v"}
    for says, part in order.groupby("verdict"):
        above.plot(part.index, part["score"], linestyle="none", marker=markers[says], color=colours[says],
                   markersize=2.2, label=f"{says} ({len(part)})")  # fmt: skip
    above.axhline(0, **NULL)
    above.set_yscale("symlog", linthresh=2)
    above.margins(y=0.08)
    choices = [("measure", name) for name in dict.fromkeys(order["measure"])]
    choices += [("self", "in"), ("sinks", "in")]
    choices += [("heads", name) for name in dict.fromkeys(order["heads"])]
    choices += [("nominal_mask_ratio", ratio) for ratio in sorted(order["nominal_mask_ratio"].unique())]
    for row, (column, value) in enumerate(choices):
        at = order.index[order[column] == value]
        below.plot(at, np.full(len(at), row), linestyle="none", marker="|", markersize=3, color="#444444")
    names = {"self": "self counted", "sinks": "sinks counted"}
    labels = [
        names.get(column) or (f"{value:.0%} masked" if column == "nominal_mask_ratio" else
                              f"heads: {value}" if column == "heads" else str(value).replace("_", "-"))
        for column, value in choices
    ]  # fmt: skip
    below.set_yticks(range(len(choices)), labels)
    below.set(ylim=(len(choices) - 0.5, -0.5), xlabel="definition, sorted by measure and size")
    below.grid(False, axis="x")


@of_rows
def plot_heads(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Growth of each head, as ranked on one half of the sequences (hollow) and measured on the other (full).

    `df`: rows of one model: layer head rank growth_ranked growth low high.
    """
    ax = ax or plt.gca()
    df = df.sort_values("rank")
    place = np.arange(len(df))
    ax.plot(place - 0.1, df["growth_ranked"], linestyle="none", marker="o", markerfacecolor="white",
            color="#8c8c8c", label="half that ranks")  # fmt: skip
    ax.errorbar(place + 0.1, df["growth"], yerr=reach(df, "growth"), linestyle="none", marker="o",
                color="#1b4f8f", linewidth=0.9, label="half that tests")  # fmt: skip
    ax.axhline(0, **NULL)
    ax.set_xticks(place, [f"{row.layer}.{row.head}" for row in df.itertuples()])
    ax.set(xlabel="layer.head, by rank", ylabel="rise of log-odds, loop 1 to $S_{max}$")
    return ax
