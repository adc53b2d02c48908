"""Figures of what happens inside: attention between groups, change of the state, maps side by side."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from analysis import zoo
from analysis.figures.figure import GRIDS, OURS, PANELS, TEXT, Figure, Tables
from analysis.plots import attention, representation
from analysis.plots.style import PAGE, mark_s_max


def _looped(df: pd.DataFrame, model: str, longest: bool = True) -> pd.DataFrame:
    """Masked queries, heads pooled, of the looped layer, read to 3 x S_max (or to S_max)."""
    part = df[(df["model"] == model) & (df["query_group"] == "masked") & df["head"].isna()]
    n_loops = part["n_loops"].max() if longest else part["n_loops"].min()
    return part[part["n_loops"] == n_loops]


def mask_to_mask(loaded: Tables) -> MatplotlibFigure:
    """Mass at half masked, log-odds at three ratios, and the layers outside the loop."""
    df = loaded["mask-attention"]
    drawn, axes = plt.subplots(2, 3, figsize=(PAGE, 4.2), layout="constrained", width_ratios=[1, 1, 0.9])
    for row, (model, title) in zip(axes, PANELS, strict=True):
        part = _looped(df, model)
        loop = part[part["segment"] == "loop"]
        half = loop[np.isclose(loop["nominal_mask_ratio"], 0.5)]
        attention.plot_mass_by_loop(half, ax=row[0])
        row[0].set_title(f"{title}: mass, 50% masked")
        log_odds = loop[loop["key_group"] == "masked"]
        attention.plot_log_odds_by_loop(log_odds, ax=row[1])
        row[1].set_title(f"{title}: log-odds")
        for ax in row[:2]:
            mark_s_max(ax, zoo.s_max(model), len(half["loop"].unique()))
        rest = _looped(df, model, longest=False)
        rest = rest[(rest["segment"] != "loop") & (rest["key_group"] == "masked")]
        attention.plot_log_odds_by_layer(rest, ax=row[2])
        row[2].set_title(f"outside the loop (S = {zoo.s_max(model)})")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[0, 1].get_legend_handles_labels()[0]]
    drawn.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, columnspacing=1.2)
    return drawn


def representation_change(loaded: Tables) -> MatplotlibFigure:
    """Relative change with its null, step cosine, KL between successive read-outs, flips."""
    df = loaded["representation-change"]
    metrics = (
        ("relative_change", "relative change"),
        ("step_cosine", "cosine of successive steps"),
        ("kl_previous", "KL to previous read-out (nats)"),
        ("top1_flips", "best token flips (share)"),
    )
    drawn, axes = plt.subplots(
        2,
        4,
        figsize=(PAGE, 3.7),
        layout="constrained",
    )
    for row, (model, title) in zip(axes, PANELS, strict=True):
        part = df[(df["model"] == model) & (df["token_group"] == "masked")]
        for ax, (metric, label) in zip(row, metrics, strict=True):
            representation.plot_metric_by_loop(part, metric, ax=ax)
            ax.set_title(label)
            mark_s_max(ax, zoo.s_max(model), df["loop"].max() + 1)
        representation.plot_drift_null(part, ax=row[0])
        for ax in (row[0], row[2]):
            ax.set_yscale("log")
        row[1].axhline(0, color="#444444", linewidth=0.6)
        row[0].set_ylabel(f"{title}\n{row[0].get_ylabel()}")
    for ax in axes[0]:
        ax.set_xlabel("")
    drawn.legend(
        handles=axes[0, 0].get_legend_handles_labels()[0], loc="outside lower center", ncols=4, frameon=False
    )
    return drawn


def attention_maps(loaded: Tables) -> MatplotlibFigure:
    """The head that changes most, side by side across loops, with the difference."""
    df = loaded["attention-maps"]
    loops = sorted(df["loop"].unique())
    stacks = {
        head: np.stack([_matrix(part[part["loop"] == loop]) for loop in loops])
        for head, part in df.groupby("head")
    }
    head = max(stacks, key=lambda key: np.abs(stacks[key][-1] - stacks[key][0]).mean())
    rows = df[(df["head"] == head) & (df["loop"] == loops[0])].drop_duplicates("query").sort_values("query")
    masked = rows["query_masked"].to_numpy()
    words = [true.strip() or "␣" for true in rows["query_true"]]
    labels = [f"[{word}]" if hidden else word for word, hidden in zip(words, masked, strict=True)]
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 6.3), layout="constrained")
    attention.draw_maps(list(axes.flat), stacks[head], loops, labels, masked)
    drawn.suptitle(
        f"sotu-loop, layer {rows['layer'].iloc[0]}, head {head}; [true tokens] of masked positions",
        fontsize=8,
    )
    return drawn


def _matrix(part: pd.DataFrame) -> np.ndarray:
    return part.pivot(index="query", columns="key", values="attention").to_numpy()


FIGURES = (
    Figure(
        "mask-to-mask-by-loop",
        ("mask-attention",),
        mask_to_mask,
        f"""Attention of masked queries in the looped layer, by loop, to 3 x S_max. Left: mean mass on other
        masked keys, on clean keys and on itself, heads averaged; dotted: chance, the mean share of such keys.
        Middle: log-odds of a masked against a clean key, self excluded; 0 = the head does not care. Right: the
        same in the layers outside the loop. {GRIDS}; {TEXT}. Bands and bars: 95%. Loop i is the same for every
        n_loops > i, so there is one curve. The paper reports that mask-to-mask attention rises with the loop
        count and saturates near S_max; a flat or falling curve counts against it. {OURS}""",
    ),
    Figure(
        "representation-change",
        ("representation-change",),
        representation_change,
        f"""Change of the state at masked positions from loop to loop, to 3 x S_max: relative change ||H(i) -
        H(i-1)|| / ||H(i)|| beside the 1/i of a constant drift; cosine of successive steps; KL of each read-out
        to the previous one; share of best tokens that flip. {GRIDS}; {TEXT}. Bands: 95%. A relative change
        that only follows the dotted line is no convergence. {OURS}""",
    ),
    Figure(
        "attention-maps",
        ("attention-maps",),
        attention_maps,
        f"""Attention of one head of sotu-loop at three loops, and last minus first. The first 32 tokens of one
        test block, drawn by seed before looking; half of them masked (in brackets, with the true token). The
        head is the one that changes most: an illustration, n = 1, not a test. The map at loop i is the map a
        run with n_loops = i ends on. {OURS}""",
    ),
)
