"""Plots of quality: NLL and solve rate by loops, learning curves."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.style import MODEL_STYLE, NULL, Z95, band, mark_s_max


def plot_nll_by_loops(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Test NELBO over n_loops, one line a model; `df`: model n_loops nll standard_error s_max."""
    ax = ax or plt.gca()
    for model, part in df.groupby("model"):
        look = MODEL_STYLE[str(model).rsplit("-", maxsplit=1)[-1]]
        low, high = part["nll"] - Z95 * part["standard_error"], part["nll"] + Z95 * part["standard_error"]
        band(ax, part["n_loops"], part["nll"], low, high, label=str(model), **look)
    _base_level(df, "nll", ax)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel="n_loops (S)", ylabel="test NELBO (nats per token)")
    return ax


def plot_change_by_loops(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """NELBO minus NELBO at S = 1, paired by sequence and mask; below 0 = looping helps."""
    ax = ax or plt.gca()
    for model, part in df.groupby("model"):
        look = MODEL_STYLE[str(model).rsplit("-", maxsplit=1)[-1]]
        half = Z95 * part["change_standard_error"].fillna(0)
        change = part["change_from_s1"]
        band(ax, part["n_loops"], change, change - half, change + half, label=str(model), **look)
    ax.axhline(0, **NULL)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel="n_loops (S)", ylabel="change from S = 1 (nats)")
    return ax


def plot_solve_rate(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Solve rate over n_loops with intervals; `df`: model n_loops solve_rate low high s_max."""
    ax = ax or plt.gca()
    for model, part in df.groupby("model"):
        look = MODEL_STYLE[str(model).rsplit("-", maxsplit=1)[-1]]
        band(ax, part["n_loops"], part["solve_rate"], part["low"], part["high"], label=str(model), **look)
    _base_level(df, "solve_rate", ax)
    mark_s_max(ax, df["s_max"].iloc[0], df["n_loops"].max())
    ax.set(xlabel="n_loops (S)", ylabel="puzzles solved in one shot", ylim=(0, None))
    return ax


def plot_learning_curves(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Validation NELBO against training FLOPs; `df`: model flops n_loops nelbo standard_error."""
    ax = ax or plt.gca()
    for (model, n_loops), part in df.groupby(["model", "n_loops"]):
        look = MODEL_STYLE[str(model).rsplit("-", maxsplit=1)[-1]]
        look = look | ({"linestyle": ":", "marker": "v"} if "loop" in str(model) and n_loops == 1 else {})
        low, high = part["nelbo"] - Z95 * part["standard_error"], part["nelbo"] + Z95 * part["standard_error"]
        band(ax, part["flops"], part["nelbo"], low, high, label=f"{model}, S = {n_loops}", **look)
    ax.set(xlabel="training FLOPs", ylabel="validation NELBO (nats per token)")
    return ax


def _base_level(df: pd.DataFrame, column: str, ax: Axes) -> None:
    """The base model as it was trained, at S = 1, carried across as a thin line."""
    base = df[df["model"].str.endswith("-base") & (df["n_loops"] == 1)]
    for level in base[column]:
        ax.axhline(level, color=MODEL_STYLE["base"]["color"], linewidth=0.8, linestyle="--", zorder=0)
