"""Plots of quality over loops or training, one line an arm: NELBO, solve rate, learning curves."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats as distributions

from analysis.plots.style import ARM_STYLE, NULL, Z95, band, mark_s_max


def over_seeds(df: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Mean of `y` over training seeds at each `x`, `low` and `high` of Student's 95% interval, and n.

    With one seed the bounds are those of the items it was measured on: columns `low` and `high` if there are
    any, else `y`_se.
    """
    rows = []
    for value, part in df.groupby(x):
        mean, n = part[y].mean(), len(part)
        if n > 1:
            half = distributions.t.ppf(0.975, n - 1) * part[y].std(ddof=1) / np.sqrt(n)
            low, high = mean - half, mean + half
        elif "low" in part:
            low, high = part["low"].iloc[0], part["high"].iloc[0]
        else:
            half = Z95 * np.nan_to_num(part[f"{y}_se"].iloc[0])
            low, high = mean - half, mean + half
        rows.append((value, mean, low, high, n))
    return pd.DataFrame(rows, columns=[x, y, "low", "high", "n"])


def plot_by_arm(df: pd.DataFrame, x: str, y: str, *, ax: Axes | None = None, **look) -> Axes:
    """`y` over `x` for each arm: mean over seeds with its interval, and a thin line a seed."""
    ax = ax or plt.gca()
    for arm in [name for name in ARM_STYLE if name in set(df["arm"])]:
        part = df[df["arm"] == arm]
        style = ARM_STYLE[arm] | look
        n = part["seed"].nunique()
        summary = over_seeds(part, x, y)
        summary = summary[summary["n"] == n]
        label = f"{arm} ({n} seed{'s' if n > 1 else ''})"
        band(ax, summary[x], summary[y], summary["low"], summary["high"], label=label, **style)
        for _, single in part.groupby("seed") if n > 1 else ():
            ax.plot(single[x], single[y], color=style["color"], linewidth=0.4, alpha=0.6, zorder=1)
    return ax


def plot_nll_by_loops(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Test NELBO over n_loops; `df`: arm seed n_loops nll nll_se s_max."""
    ax = ax or plt.gca()
    plot_by_arm(df, "n_loops", "nll", ax=ax)
    _base_level(df, "nll", ax)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel="n_loops (S)", ylabel="test NELBO (nats per token)")
    return ax


def plot_change_by_loops(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """NELBO minus NELBO at S = 1, paired by sequence and mask; below 0 = looping helps."""
    ax = ax or plt.gca()
    plot_by_arm(df, "n_loops", "change_from_s1", ax=ax)
    ax.axhline(0, **NULL)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel="n_loops (S)", ylabel="change from S = 1 (nats)")
    return ax


def plot_solve_rate(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Solve rate over n_loops; `df`: arm seed n_loops solve_rate low high s_max."""
    ax = ax or plt.gca()
    plot_by_arm(df, "n_loops", "solve_rate", ax=ax)
    _base_level(df, "solve_rate", ax)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel="n_loops (S)", ylabel="puzzles solved in one shot", ylim=(0, 1))
    return ax


def plot_learning_curves(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Validation NELBO over training FLOPs, each arm at its S_max; `df`: arm seed point flops nelbo nelbo_se."""
    ax = ax or plt.gca()
    own = df[df["n_loops"] == df["max_loops"]]
    flops = own.groupby(["arm", "point"])["flops"].transform("mean")  # seeds differ by less than a step's cost
    plot_by_arm(own.assign(flops=flops), "flops", "nelbo", ax=ax)
    ax.set(xlabel="training FLOPs", ylabel="validation NELBO (nats per token)")
    return ax


def plot_gain_by_noise(df: pd.DataFrame, s_max: int, *, ax: Axes | None = None) -> Axes:
    """Gain over S = 1 by mask ratio, mean over seeds, a line a loop count; the interval of S_max only.

    `df`: seed n_loops mask_ratio gain gain_standard_error.
    """
    ax = ax or plt.gca()
    df = df.drop(columns=["low", "high"]).rename(columns={"gain_standard_error": "gain_se"})
    counts = sorted(count for count in df["n_loops"].unique() if count > 1)
    for shade, (count, marker) in enumerate(zip(counts, "v^sD", strict=False)):
        part = over_seeds(df[df["n_loops"] == count], "mask_ratio", "gain")
        look = {"color": plt.get_cmap("Blues")(0.35 + 0.6 * shade / max(1, len(counts) - 1)), "marker": marker}
        if count == s_max:
            look = ARM_STYLE["loop"] | {"color": "#d95f02"}
            ax.fill_between(
                part["mask_ratio"], part["low"], part["high"], color="#d95f02", alpha=0.15, linewidth=0
            )
        name = "$S_{max}$" if count == s_max else "S"
        ax.plot(part["mask_ratio"], part["gain"], label=f"{name} = {count}", **look)
    ax.axhline(0, **NULL)
    ax.set(xlabel="mask ratio (bin's middle)", ylabel="gain over S = 1 (nats per token)")
    return ax


def plot_zero_shot(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """NELBO of each corpus by model and loop count, with intervals; `df`: label corpus nelbo standard_error."""
    ax = ax or plt.gca()
    corpora, labels = list(dict.fromkeys(df["corpus"])), list(dict.fromkeys(df["label"]))
    looks = [
        ARM_STYLE["base"],
        *({"color": c, "marker": m} for c, m in zip(("#9ecae1", "#4292c6", "#08306b"), "v^o", strict=True)),
    ]
    for offset, (label, look) in enumerate(zip(labels, looks, strict=False)):
        part = df[df["label"] == label].set_index("corpus").loc[corpora]
        place = np.arange(len(corpora)) + 0.16 * (offset - (len(labels) - 1) / 2)
        ax.errorbar(
            part["nelbo"],
            place,
            xerr=Z95 * part["standard_error"],
            label=label,
            linewidth=0.9,
            **dict(look) | {"linestyle": "none"},
        )
    ax.set_yticks(range(len(corpora)), corpora)
    ax.invert_yaxis()
    ax.set(xlabel="zero-shot NELBO (nats per token)")
    return ax


def plot_training_free(df: pd.DataFrame, value: str, *, ax: Axes | None = None) -> Axes:
    """A column of `training-free` over n_loops, naive and damped, mean over seeds; `df`: seed damping n_loops."""
    ax = ax or plt.gca()
    looks = {"none": ("#8c8c8c", "s", "--", "full steps"), "1/n_loops": ("#1b4f8f", "o", "-", "damped by 1/S")}
    for damping, (colour, marker, line, label) in looks.items():
        part = df[df["damping"] == damping]
        summary = over_seeds(part, "n_loops", value)
        band(
            ax,
            summary["n_loops"],
            summary[value],
            summary["low"],
            summary["high"],
            color=colour,
            marker=marker,
            linestyle=line,
            label=label,
        )
    ax.axhline(0, **NULL)
    ax.set(xlabel="n_loops (S)")
    return ax


def _base_level(df: pd.DataFrame, column: str, ax: Axes) -> None:
    """The base arm as it was trained, at S = 1, carried across as a thin line."""
    base = df[(df["arm"] == "base") & (df["n_loops"] == 1)]
    if len(base):
        ax.axhline(base[column].mean(), color=ARM_STYLE["base"]["color"], linewidth=0.8, linestyle="--", zorder=0)
