"""Plots of quality over loops or training, one line an arm: NELBO, solve rate, learning curves."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from loopmdm.analysis.plots.style import (
    AMOUNT_STYLE,
    ARM_STYLE,
    NULL,
    RUN,
    interval_band,
    mark_s_max,
    of_rows,
    reach,
)


@of_rows
def plot_by_arm(df: pd.DataFrame, x: str, y: str, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """`y` over `x` for each arm: mean over seeds with its interval where all have one, and a thin line a seed.

    `df`: arm seed x y mean low high n_seeds.
    """
    ax = ax or plt.gca()
    for arm in [name for name in ARM_STYLE if name in set(df["arm"])]:
        part = df[df["arm"] == arm]
        n = part["seed"].nunique()
        line = part[part["n_seeds"] == n].drop_duplicates(x).sort_values(x)
        look = ARM_STYLE[arm] | {"label": f"{arm} ({n} seed{'s' if n > 1 else ''})"} | kws
        interval_band(ax, line[x], line, "mean", **look)
        for _, single in part.groupby("seed") if n > 1 else ():
            ax.plot(single[x], single[y], color=look["color"], linewidth=0.4, alpha=0.6, zorder=1)
    return ax


@of_rows
def plot_nll_by_loops(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Test NELBO over n_loops; `df`: arm seed n_loops nll mean low high n_seeds s_max."""
    ax = ax or plt.gca()
    plot_by_arm(df, "n_loops", "nll", ax=ax, **kws)
    _base_level(df, ax)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel=RUN, ylabel="test NELBO (nats per token)")
    return ax


@of_rows
def plot_change_by_loops(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """NELBO minus NELBO at S = 1, paired by sequence and mask; below 0 = looping helps.

    `df`: arm seed n_loops change_from_s1 mean low high n_seeds s_max.
    """
    ax = ax or plt.gca()
    plot_by_arm(df, "n_loops", "change_from_s1", ax=ax, **kws)
    ax.axhline(0, **NULL)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel=RUN, ylabel="change from S = 1\n(nats per token)")
    return ax


@of_rows
def plot_solve_rate(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Solve rate over n_loops; `df`: arm seed n_loops solve_rate mean low high n_seeds s_max."""
    ax = ax or plt.gca()
    plot_by_arm(df, "n_loops", "solve_rate", ax=ax, **kws)
    _base_level(df, ax)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel=RUN, ylabel="puzzles solved in one shot (share)", ylim=(-0.02, 1.02))
    return ax


def side_by_side(place: int, n: int) -> np.ndarray:
    """Where n marks stand around a place on the axis."""
    return place + 0.1 * (np.arange(n) - (n - 1) / 2)


@of_rows
def plot_accuracy(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Share of problems answered rightly over n_loops with its interval, a guess as a dotted line.

    `df`: arm n_loops accuracy low high chance s_max; arms that were not looped have S = 1 alone.
    """
    ax = ax or plt.gca()
    arms = [arm for arm in ARM_STYLE if arm in set(df["arm"])]
    for shift, arm in zip(side_by_side(0, len(arms)), arms, strict=True):
        part = df[df["arm"] == arm].sort_values("n_loops")
        look = {"label": arm} | ARM_STYLE[arm]
        ax.errorbar(part["n_loops"] + shift, part["accuracy"], yerr=reach(part, "accuracy"), **look | kws)
    ax.axhline(df["chance"].iloc[0], **NULL)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel=RUN, ylabel="right answers (share)", ylim=(-0.05 * df["high"].max(), None))
    return ax


@of_rows
def plot_learning_curves(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Validation NELBO over training FLOPs; `df`: arm seed flops nelbo mean low high n_seeds."""
    ax = ax or plt.gca()
    plot_by_arm(df, "flops", "nelbo", ax=ax, **kws)
    ax.set(xlabel="training FLOPs", ylabel="validation NELBO (nats per token)")
    return ax


@of_rows
def plot_gain_by_noise(df: pd.DataFrame, s_max: int, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Gain over S = 1 by mask ratio, mean over seeds, a line a loop count; the interval of S_max only.

    `df`: n_loops mask_ratio mean low high.
    """
    ax = ax or plt.gca()
    df = df.drop_duplicates(["n_loops", "mask_ratio"]).sort_values("mask_ratio")
    counts = sorted(count for count in df["n_loops"].unique() if count > 1)
    for shade, (count, marker) in enumerate(zip(counts, "v^sD", strict=False)):
        part = df[df["n_loops"] == count]
        look = {"color": plt.get_cmap("Blues")(0.35 + 0.6 * shade / max(1, len(counts) - 1)), "marker": marker}
        if count == s_max:
            look = ARM_STYLE["loop"] | {"color": "#d95f02"}
            ax.fill_between(
                part["mask_ratio"], part["low"], part["high"], color="#d95f02", alpha=0.15, linewidth=0
            )
        name = "$S_{max}$" if count == s_max else "S"
        ax.plot(part["mask_ratio"], part["mean"], **{"label": f"{name} = {count}"} | look | kws)
    ax.axhline(0, **NULL)
    ax.set(xlabel="masked (share, middle of bin)", ylabel="gain over S = 1 (nats per token)")
    return ax


@of_rows
def plot_zero_shot(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """NELBO of each corpus by model and loop count, with intervals; `df`: label corpus nelbo low high."""
    ax = ax or plt.gca()
    corpora, labels = list(dict.fromkeys(df["corpus"])), list(dict.fromkeys(df["label"]))
    looks = [
        ARM_STYLE["base"],
        *({"color": c, "marker": m} for c, m in zip(("#9ecae1", "#4292c6", "#08306b"), "v^o", strict=True)),
    ]
    for offset, (label, look) in enumerate(zip(labels, looks, strict=False)):
        part = df[df["label"] == label].set_index("corpus").loc[corpora]
        place = np.arange(len(corpora)) + 0.16 * (offset - (len(labels) - 1) / 2)
        look = {"label": label, "linewidth": 0.9} | look | {"linestyle": "none"}
        ax.errorbar(part["nelbo"], place, xerr=reach(part, "nelbo"), **look | kws)
    ax.set_yticks(range(len(corpora)), corpora)
    ax.invert_yaxis()
    ax.set(xlabel="zero-shot NELBO (nats per token)", ylabel="corpus")
    return ax


def _base_level(df: pd.DataFrame, ax: Axes) -> None:
    """The base arm as it was trained, at S = 1, carried across as a thin line."""
    base = df[(df["arm"] == "base") & (df["n_loops"] == 1)]
    if len(base):
        level = base["mean"].iloc[0]
        ax.axhline(level, color=ARM_STYLE["base"]["color"], linewidth=0.8, linestyle="--", zorder=0)


@of_rows
def plot_arms(
    df: pd.DataFrame, value: str, looks: Mapping[str, Mapping] = ARM_STYLE, *, ax: Axes | None = None, **kws: Any
) -> Axes:
    """A mark a training seed and a bar at the mean for each arm of `looks`; `df`: arm mean and column `value`."""
    ax = ax or plt.gca()
    arms = [arm for arm in looks if arm in set(df["arm"])]
    for place, arm in enumerate(arms):
        part = df[df["arm"] == arm]
        ax.plot(side_by_side(place, len(part)), part[value], **{**looks[arm], "linestyle": "none", **kws})
        if len(part) > 1:
            ax.hlines(part["mean"].iloc[0], place - 0.32, place + 0.32, color="#444444", linewidth=1.2)
    labels = [looks[arm].get("label", arm.replace("-", "\n")) + f"\n({(df['arm'] == arm).sum()})" for arm in arms]
    ax.set_xticks(range(len(arms)), labels)
    ax.set_xlim(-0.6, len(arms) - 0.4)
    return ax


@of_rows
def plot_amounts(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Test NELBO over n_loops, a line an S_max of training (its place ringed).

    `df`: arm seed n_loops nll mean s_max.
    """
    ax, ticks = ax or plt.gca(), [1, 2, 4, 6, 8, 12, 24, 36]
    for arm, look in AMOUNT_STYLE.items():
        part = df[df["arm"] == arm]
        if part.empty:
            continue
        mean = part.drop_duplicates("n_loops").set_index("n_loops")["mean"].sort_index()
        ticked = [place for place, count in enumerate(mean.index) if count in ticks]
        ax.plot(mean.index, mean, **{"markersize": 2.8, "linewidth": 1, "markevery": ticked} | look | kws)
        for _, single in part.groupby("seed") if part["seed"].nunique() > 1 else ():
            ax.plot(single["n_loops"], single["nll"], color=look["color"], linewidth=0.4, alpha=0.6, zorder=1)
        most = part["s_max"].iloc[0]
        ax.plot(most, mean[most], marker="o", markersize=7, fillstyle="none", color=look["color"])
    _base_level(df, ax)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set(xlabel=RUN, ylabel="test NELBO (nats per token)")
    return ax


NEVER = 0.3
"""Where on the axis of ratios stands what is not reached."""


@of_rows
def plot_flops_ratio(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """FLOPs of `against` / FLOPs of `arm` for a NELBO, by share of the second's budget; on grey: never reached.

    `df`: rows of one task and pair: arm against share ratio low high n_reached n n_reached_against n_against;
    `kws` go to the marks.
    """
    ax = ax or plt.gca()
    for place, row in enumerate(df.sort_values("share").itertuples()):
        look = ARM_STYLE[row.arm] | {"linestyle": "none", "markersize": 5} | kws
        if np.isfinite(row.ratio):
            ax.plot(place, row.ratio, **look)
            if np.isfinite(row.low):
                ax.vlines(place, row.low, row.high, color=look["color"], linewidth=1.2)
            continue
        short = row.n_reached < row.n
        who = row.arm if short else row.against
        count = (row.n_reached, row.n) if short else (row.n_reached_against, row.n_against)
        ax.text(place, NEVER, f"{who}:\n{count[0]} of {count[1]}", ha="center", va="center", fontsize=6.5)
    ax.axhline(1, **NULL)
    ax.axhspan(0.2, 0.4, color="#eeeeee", zorder=0)
    ax.set_yscale("log")
    ax.set_yticks([NEVER, 0.5, 1, 2], ["seeds that\nget there", "0.5", "1", "2"])
    ax.set_yticks([], minor=True)
    shares = sorted(df["share"])
    ax.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    ax.grid(False, axis="x")
    ax.set(xlim=(-0.5, len(shares) - 0.5), ylim=(0.22, 2.4), xlabel="of the second's budget (share)")
    return ax


@of_rows
def plot_generative(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Judge's NLL of samples: n_loops x denoising steps as numbers on a heat map, contours of equal FLOPs.

    `df`: samples of one model: n_loops steps flops judge_nll high; `kws` go to `imshow`.
    """
    ax = ax or plt.gca()
    table, high, flops = (
        df.pivot(index="n_loops", columns="steps", values=name) for name in ("judge_nll", "high", "flops")
    )
    half = high - table
    image = ax.imshow(table, **{"cmap": "Greys", "aspect": "auto", "origin": "lower", "alpha": 0.6} | kws)
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        spent = f"{flops.to_numpy()[row, column] / 1e9:.1f} GFLOPs"
        text = f"{value:.2f} ± {half.to_numpy()[row, column]:.2f}\n{spent}"
        ax.text(column, row, text, ha="center", va="center", fontsize=6.2, color="black")
    if min(table.shape) > 1:
        levels = np.geomspace(flops.to_numpy().min(), flops.to_numpy().max(), 6)[1:-1]
        ax.contour(np.log10(flops), levels=np.log10(levels), colors="#d95f02", linewidths=0.9, alpha=0.6)
    ax.set_xticks(range(table.shape[1]), [str(steps) for steps in table.columns])
    ax.set_yticks(range(table.shape[0]), [str(count) for count in table.index])
    ax.grid(False)
    ax.set(xlabel="denoising steps", ylabel=RUN)
    ax.figure.colorbar(image, ax=ax, label="judge's NLL (nats per judge token)", shrink=0.9)
    return ax


@of_rows
def plot_loops_or_steps(df: pd.DataFrame, *, ax: Axes | None = None, **kws: Any) -> Axes:
    """Quality of samples against FLOPs of a whole sampling run, a line an n_loops.

    `df`: rows of one model and measure: n_loops budget flops quality low high.
    """
    ax = ax or plt.gca()
    counts = sorted(df["n_loops"].unique())
    for shade, (count, marker) in enumerate(zip(counts, "sv^oD", strict=False)):
        part = df[df["n_loops"] == count].sort_values("flops")
        colour = plt.get_cmap("Blues")(0.35 + 0.6 * shade / max(1, len(counts) - 1))
        look = {"color": colour, "marker": marker, "linestyle": "-", "linewidth": 1}
        bars = reach(part, "quality")
        ax.errorbar(part["flops"] / 1e9, part["quality"], yerr=bars, **{"label": f"S = {count}"} | look | kws)
    budgets = sorted(set(df["budget"] / 1e9))
    ax.set_xscale("log")
    ax.set_xticks(budgets, [f"{budget:.2g}" for budget in budgets])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="GFLOPs a sample (budgets ticked)")
    return ax


@of_rows
def plot_gap(df: pd.DataFrame, looks: Mapping[str, Mapping], *, ax: Axes | None = None, **kws: Any) -> Axes:
    """NELBO of loop less that of base over tokens a parameter of base, a line a run of `label`s, 95% at its end.

    `df`: label tokens parameters gap low high; `looks` by label, in the order of drawing.
    """
    ax = ax or plt.gca()
    for label, look in looks.items():
        part = df[df["label"] == label].sort_values("tokens")
        if part.empty:
            continue
        across = part["tokens"] / part["parameters"]
        ax.plot(across, part["gap"], **{"label": label, "markevery": [-1]} | dict(look) | kws)
        last = part.iloc[-1]
        ax.vlines(across.iloc[-1], last["low"], last["high"], color=look["color"], linewidth=0.7, alpha=0.7)
    ax.axhline(0, **NULL)
    ax.set(xlabel="training tokens / parameters of base", ylabel="loop less base\n(nats per token)", xscale="log")
    return ax
