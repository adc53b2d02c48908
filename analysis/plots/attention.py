"""Plots of attention between masked and clean positions, and of maps across loop counts."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from loopmdm.analysis.plots.style import (
    AMOUNT_STYLE,
    CLEAN,
    KEY_STYLE,
    LOOP,
    MASKED,
    NULL,
    ODDS,
    RATIO_STYLE,
    interval_band,
    of_rows,
    plainly,
    reach,
    root_norm,
    style,
)


@of_rows
def plot_mass_by_loop(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Mass of masked queries on masked, clean and own key over `loop`, chance as dotted lines.

    `df`: rows of one model, layer and mask ratio with loop key_group mass low high chance.
    """
    ax = ax or plt.gca()
    for group, look in KEY_STYLE.items():
        part = df[df["key_group"] == group].sort_values("loop")
        x = part["loop"].astype(int)
        interval_band(ax, x, part, "mass", **look | kws)
        ax.plot(x, part["chance"], **NULL | {"color": look["color"]})
    ax.set(xlabel=LOOP, ylabel="attention mass (share)", ylim=(0, None))
    return ax


@of_rows
def plot_log_odds_by_loop(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Log-odds of masked against clean keys over `loop`, a line a mask ratio; 0 = indifferent.

    `df`: rows of one model and layer with loop nominal_mask_ratio log_odds low high.
    """
    ax = ax or plt.gca()
    for ratio, look in RATIO_STYLE.items():
        part = df[np.isclose(df["nominal_mask_ratio"], ratio)].sort_values("loop")
        if part.empty:
            continue
        x = part["loop"].astype(int)
        interval_band(ax, x, part, "log_odds", **{"label": f"{ratio:.0%} masked"} | look | kws)
    ax.axhline(0, **NULL)
    ax.set(xlabel=LOOP, ylabel=ODDS)
    return ax


def plot_other_seeds(frames: Sequence[pd.DataFrame], *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Log-odds at half masked of other training seeds, a thin line each; frames as `plot_log_odds_by_loop`'s."""
    ax = ax or plt.gca()
    look = {"color": RATIO_STYLE[0.5]["color"], "linewidth": 0.5, "zorder": 1}
    for df in frames:
        part = df[np.isclose(df["nominal_mask_ratio"], 0.5)].sort_values("loop")
        ax.plot(part["loop"].astype(int), part["log_odds"], **look | kws)
    return ax


@of_rows
def plot_by_s_max(df: pd.DataFrame, *, axes: Sequence[Axes], **kws: Any) -> Sequence[Axes]:
    """Log-odds over loops, and their rise since the first over loops run / S_max; a line an S_max of training.

    Seeds beyond the first are thin. `df`: arm seed s_max loop log_odds low high; `kws` go to the thick lines.
    """
    for arm in [name for name in AMOUNT_STYLE if name in set(df["arm"])]:
        for seed, part in df[df["arm"] == arm].groupby("seed"):
            part, look = part.sort_values("loop"), AMOUNT_STYLE[arm] | {"markersize": 2.4} | kws
            x, y = part["loop"].astype(int), part["log_odds"]
            rise = y - y.iloc[0]
            if seed:
                look = {"color": look["color"], "linewidth": 0.5, "zorder": 1}
                axes[0].plot(x, y, **look)
            else:
                interval_band(axes[0], x, part, "log_odds", **look)
                last = x == part["s_max"] - 1
                axes[0].plot(x[last], y[last], marker="o", markersize=7, fillstyle="none", color=look["color"])
            axes[1].plot((x + 1) / part["s_max"], rise, **look)
    axes[0].axhline(0, **NULL)
    axes[0].set(xlabel=LOOP, ylabel=ODDS)
    axes[1].axhline(0, **NULL)
    axes[1].axvline(1, color="#666666", linewidth=0.8, linestyle="-.", zorder=0)
    axes[1].set(xlabel="loops run / $S_{max}$", ylabel="log-odds less those\nof the first loop (nats)")
    return axes


@of_rows
def plot_log_odds_by_layer(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Log-odds of the layers outside the loop, a mark a mask ratio.

    `df`: rows of one model with segment layer nominal_mask_ratio log_odds low high.
    """
    ax = ax or plt.gca()
    layers = sorted(df["layer"].unique())
    for offset, (ratio, look) in enumerate(RATIO_STYLE.items()):
        part = df[np.isclose(df["nominal_mask_ratio"], ratio)].sort_values("layer")
        x = [layers.index(layer) + 0.18 * (offset - 1) for layer in part["layer"]]
        look = {"label": f"{ratio:.0%} masked"} | look | {"linestyle": "none"}
        ax.errorbar(x, part["log_odds"], yerr=reach(part, "log_odds"), **look | kws)
    names = [df.loc[df["layer"] == layer, "segment"].iloc[0] for layer in layers]
    ax.set_xticks(
        range(len(layers)), [f"{name}\nlayer {layer}" for name, layer in zip(names, layers, strict=True)]
    )
    ax.set_xlim(-0.6, len(layers) - 0.4)
    ax.axhline(0, **NULL)
    return ax


CHANGES, WEIGHTS = "change of attention (share; square-root scale)", "attention (share; square-root scale)"


def plot_map(
    weights: np.ndarray, labels: list[str], masked: np.ndarray, *, ax: Axes, most: float | None = None, **kws: Any
) -> AxesImage:
    """One attention map [query, key] on a square-root scale to `most`; labels are coloured, masked or clean.

    Negative weights make it a change: a scale about 0. `kws` go to `imshow`.
    """
    signed = bool(weights.min() < 0)
    most = float(np.abs(weights).max()) if most is None else most
    look = {"cmap": "RdBu_r" if signed else "Greys", "norm": root_norm(most or 1.0, signed)}
    if {"vmin", "vmax"} & kws.keys():
        del look["norm"]
    image = ax.imshow(weights, **look | {"interpolation": "nearest"} | kws)
    places, size = range(len(labels)), max(3.5, min(6.5, 190 / max(len(labels), 1)))
    ax.set_xticks(places, [plainly(label) for label in labels], rotation=90)
    ax.set_yticks(places, [plainly(label) for label in labels])
    ax.tick_params(length=0, labelsize=size, pad=1)
    for tick, hidden in zip([*ax.get_xticklabels(), *ax.get_yticklabels()], [*masked, *masked], strict=True):
        tick.set_color(MASKED if hidden else CLEAN)
        tick.set_fontweight("bold" if hidden else "normal")  # for those who see no colours
    ax.grid(False)
    ax.set(xlabel="key", ylabel="query")
    return image


def loop_name(loop: int) -> str:
    """How a panel names one loop: as code counts it."""
    return f"loop {loop} (first)" if not loop else f"loop {loop}"


def draw_maps(
    axes: Sequence[Axes], maps: np.ndarray, loops: Sequence[int], labels: list[str], masked: np.ndarray, **kws: Any
) -> tuple[AxesImage, AxesImage]:
    """Fill axes with one map a loop on a common scale, then last minus first on its own; a map and the change."""
    top, change, image = float(maps.max()), maps[-1] - maps[0], None
    for ax, loop, weights in zip(axes, loops, maps, strict=False):
        image = plot_map(weights, labels, masked, ax=ax, most=top, **kws)
        ax.set_title(loop_name(loop))
    limit = float(np.abs(change).max()) or 1.0
    look = {"cmap": "RdBu_r", "norm": root_norm(limit, signed=True)}
    changed = plot_map(change, labels, masked, ax=axes[len(loops)], **look)
    axes[len(loops)].set_title(f"loop {loops[-1]} − loop {loops[0]}")
    assert image is not None
    return image, changed


def name_bars(grid: np.ndarray, images: tuple[AxesImage, AxesImage]) -> None:
    """One colour bar for the maps beside the first row of `grid`, one for the change beside the last."""
    figure = grid.flat[0].figure
    sides = (grid[0], grid[-1]) if len(grid) > 1 else (grid, grid)
    for axes, image, label in zip(sides, images, (WEIGHTS, CHANGES), strict=True):
        bar = figure.colorbar(image, ax=list(axes.flat), label=label, shrink=0.85)
        most = float(image.norm.vmax)
        steps = np.array([0, 0.01, 0.05, 0.2, 0.5, 1.0])
        steps = steps[steps <= most]
        steps = steps if label == WEIGHTS else np.unique([*-steps, *steps])
        bar.set_ticks(steps.tolist(), labels=[f"{step:g}" for step in steps])
        bar.ax.minorticks_off()


@runtime_checkable
class Maps(Protocol):
    """Maps of one head: `maps` [shown loop, query, key], `labels` and `masked` [query] in the shown order."""

    layer: int
    head: int
    loops: tuple[int, ...]
    maps: np.ndarray
    labels: list[str]
    masked: np.ndarray


def plot_maps(
    maps: Maps, *, ax: Axes | None = None, axes: Sequence[Axes] | None = None, **kws: Any
) -> Axes | Figure:
    """Maps of the same head side by side across loops, and last minus first; of a single loop its map alone.

    `ax` takes the map of a single loop and comes back. `axes` takes a map a loop and the change, in a figure of
    one's own, which comes back. `kws` go to `imshow`, for the maps. Known to pyplot.
    """
    labels = [
        "■" if hidden else text.strip() or "␣" for text, hidden in zip(maps.labels, maps.masked, strict=True)
    ]
    single, n = len(maps.loops) == 1, len(maps.loops) + 1
    name = f"layer {maps.layer}, head {maps.head}; ■ = [MASK]"
    with style():
        if single and axes is None:
            ax = ax or plt.subplots(figsize=(4.2, 3.6), layout="constrained")[1]
            image = plot_map(maps.maps[0], labels, maps.masked, ax=ax, **kws)
            ax.figure.colorbar(image, ax=ax, label=WEIGHTS, shrink=0.85)
            ax.set_title(f"{loop_name(maps.loops[0])}, {name}")
            return ax
        if axes is not None:
            draw_maps(axes, maps.maps, maps.loops, labels, maps.masked, **kws)
            return axes[0].figure
        columns = 2 if n <= 4 else 3
        rows = -(-n // columns)
        size = (7.4, 6.2 / columns * rows)
        figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        images = draw_maps(list(grid.flat), maps.maps, maps.loops, labels, maps.masked, **kws)
        name_bars(grid, images)
        for spare in list(grid.flat)[n:]:
            spare.set_axis_off()
        figure.suptitle(name, fontsize=8)
    return figure


@of_rows
def plot_content_by_loop(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """What the masked keys' values move into masked queries, over `loop`, a line a mask ratio.

    `df`: rows of one model and layer with loop nominal_mask_ratio content low high.
    """
    ax = ax or plt.gca()
    for ratio, look in RATIO_STYLE.items():
        part = df[np.isclose(df["nominal_mask_ratio"], ratio)].sort_values("loop")
        x = part["loop"].astype(int)
        interval_band(ax, x, part, "content", **{"label": f"{ratio:.0%} masked"} | look | kws)
    ax.set(xlabel=LOOP, ylabel="content (norm of the state)", ylim=(0, None))
    return ax


@of_rows
def plot_by_step(df: pd.DataFrame, *, most: float | None = None, ax: Axes | None = None, **kws: Any) -> Axes:
    """Log-odds masked : clean as a heat map, denoising step x loop; `df`: step mask_ratio loop log_odds.

    A step has one mask ratio. The scale reaches from -`most` to `most`, the largest value if it is not given.
    """
    ax = ax or plt.gca()
    table = df.pivot(index="step", columns="loop", values="log_odds").dropna(how="all")
    ratios = df.groupby("step")["mask_ratio"].first()
    most = float(np.nanmax(np.abs(table.to_numpy(dtype=float)))) if most is None else most
    look = {"cmap": "PuOr_r", "vmin": -most, "vmax": most, "aspect": "auto"}
    image = ax.imshow(table.astype(float), **look | kws)
    for (row, column), value in np.ndenumerate(table.to_numpy(dtype=float)):
        colour = "white" if abs(value) > 0.6 * most else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.2, color=colour)
    ax.set_xticks(range(table.shape[1]), [str(loop) for loop in table.columns])
    ax.set_yticks(range(table.shape[0]), [f"{step + 1}: {ratios[step]:.0%}" for step in table.index])
    ax.grid(False)
    ax.set(xlabel=LOOP, ylabel="denoising step: masked")
    ax.figure.colorbar(image, ax=ax, label=ODDS, shrink=0.9)
    return ax


COUNTED_STYLE = {
    (False, False): {"marker": "o", "label": "neither"},
    (True, False): {"marker": "^", "label": "self"},
    (False, True): {"marker": "s", "label": "sinks"},
    (True, True): {"marker": "D", "label": "self and sinks"},
}
"""What a definition counts among the keys: the query itself, keys that draw attention whatever the query."""
HEADS = ("average", "content", "growth")
"""Ways to pool heads, in the order of the axis."""
HEADLINE = {"measure": "log_odds", "self": "out", "sinks": "in", "heads": "average", "nominal_mask_ratio": 0.5}
"""The definition of which the claim is judged."""


@of_rows
def plot_specifications(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """The rise under every definition of one measure, with 95%: by heads and mask ratio along the axis, a mark by
    what is counted; hollow where the interval holds 0, ringed the headline definition.

    `df`: rows of one model and measure: measure self sinks heads nominal_mask_ratio estimate low high; `kws` go to
    the marks.
    """
    ax = ax or plt.gca()
    ratios = sorted(RATIO_STYLE)
    for row in df.to_dict("records"):
        counted = row["self"] == "in", row["sinks"] == "in"
        number, ratio = HEADS.index(row["heads"]), min(ratios, key=lambda r: abs(r - row["nominal_mask_ratio"]))
        x = number + 0.26 * (ratios.index(ratio) - 1) + 0.055 * (list(COUNTED_STYLE).index(counted) - 1.5)
        colour = kws.get("color", RATIO_STYLE[ratio]["color"])
        sure = row["low"] > 0 or row["high"] < 0
        ax.vlines(x, row["low"], row["high"], color=colour, linewidth=0.8)
        look = {"color": colour, "marker": COUNTED_STYLE[counted]["marker"], "markersize": 2.8,
                "markerfacecolor": colour if sure else "white", "linestyle": "none"}  # fmt: skip
        ax.plot(x, row["estimate"], **look | kws)
        if all(row[name] == value for name, value in HEADLINE.items()):
            ax.plot(x, row["estimate"], marker="o", markersize=8, fillstyle="none", color="black")
    ax.axhline(0, **NULL)
    for edge in (0.5, 1.5):
        ax.axvline(edge, color="#cccccc", linewidth=0.6)
    ax.set_xticks(range(len(HEADS)), ["averaged", "by content", "grows most"])
    ax.grid(False, axis="x")
    ax.set(xlim=(-0.5, 2.5), xlabel="heads")
    ax.margins(y=0.12)
    return ax


def specification_handles() -> list[Line2D]:
    """A legend for `plot_specifications`."""
    plain = {"linestyle": "none", "markersize": 4}
    colours = [Line2D([], [], marker="o", color=look["color"], label=f"{ratio:.0%} masked", **plain)
               for ratio, look in RATIO_STYLE.items()]  # fmt: skip
    marks = [Line2D([], [], color="#444444", marker=look["marker"], label=f"{look['label']} counted", **plain)
             for look in COUNTED_STYLE.values()]  # fmt: skip
    hollow = Line2D([], [], marker="o", color="#444444", markerfacecolor="white", label="95% holds 0", **plain)
    ring = Line2D([], [], marker="o", color="black", fillstyle="none", linestyle="none", markersize=8,
                  label="headline definition")  # fmt: skip
    return [*colours, ring, *marks, hollow]


@of_rows
def plot_heads(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Growth of each head, as ranked on one half of the sequences (hollow) and measured on the other (full).

    `df`: rows of one model: layer head rank growth_ranked growth low high; `kws` go to the marks of both halves.
    """
    ax = ax or plt.gca()
    df = df.sort_values("rank")
    place = np.arange(len(df))
    dot = {"linestyle": "none", "marker": "o"}
    ranks = dot | {"markerfacecolor": "white", "color": "#8c8c8c", "label": "half that ranks"}
    tests = dot | {"color": "#1b4f8f", "linewidth": 0.9, "label": "half that tests"}
    ax.plot(place - 0.1, df["growth_ranked"], **ranks | kws)
    ax.errorbar(place + 0.1, df["growth"], yerr=reach(df, "growth"), **tests | kws)
    ax.axhline(0, **NULL)
    ax.set_xticks(place, [f"{row.layer}.{row.head}" for row in df.itertuples()])
    ax.set(xlabel="layer.head, by rank", ylabel="rise of log-odds, first to last\nloop of $S_{max}$ (nats)")
    return ax
