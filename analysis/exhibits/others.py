"""Figures of other people's models beside ours."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits.registry import OURS, TEXT, Exhibit, Tables
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.plots import others
from loopmdm.analysis.plots.style import PAGE, RUN

SHOWN = ("sotu-base", "sotu-loop", "sapiens-heavy", "sapiens-light", "antiberty")
"""Ours first."""


def attention_of_others(loaded: Tables) -> MatplotlibFigure:
    """Mass and log-odds of masked queries over layer applications, a column a model."""
    df = loaded["attention-of-others"]
    df = df[(df["query_group"] == "masked") & df["head"].isna()]
    half = with_interval(df[np.isclose(df["nominal_mask_ratio"], 0.5)], "mass")
    odds = with_interval(df[df["key_group"] == "masked"], "log_odds")
    names = _shown(df)
    width = [df[df["model"] == name]["depth"].nunique() + 1.5 for name in names]
    drawn, axes = plt.subplots(
        2, len(names), figsize=(PAGE, 4.0), layout="constrained", sharex="col", sharey="row", width_ratios=width
    )
    for column, name in enumerate(names):
        others.plot_mass_by_depth(half[half["model"] == name], ax=axes[0, column])
        others.plot_log_odds_by_depth(odds[odds["model"] == name], ax=axes[1, column])
        axes[0, column].set_title(name)
        looped = name == "sotu-loop"
        axes[1, column].set_xlabel("layer (grey: looped), loop (0 = first) beneath" if looped else "layer")
    axes[0, 0].set_ylim(0, None)
    _outer(axes)
    _legend(drawn, [axes[0, 0], axes[1, -1]])
    return drawn


def training_free_of_others(loaded: Tables) -> MatplotlibFigure:
    """Change of the NELBO in full and in damped steps, and rise of the log-odds in damped ones."""
    df = loaded["training-free-of-others"]
    df = df.assign(block=[_block(row.first_layer, row.n_layers) for row in df.itertuples()])
    rows = (
        ("none", "change", "full steps:\nchange of NELBO\n(nats per token)"),
        ("1/n_loops", "change", "damped by 1/S:\nchange of NELBO\n(nats per token)"),
        ("1/n_loops", "rise", "damped by 1/S:\nrise of log-odds\nmasked : clean (nats)"),
    )
    names = _shown(df)
    drawn, axes = plt.subplots(3, len(names), figsize=(PAGE, 5.0), layout="constrained", sharex=True, sharey="row")
    for line, (damping, value, label) in zip(axes, rows, strict=True):
        part = with_interval(df[df["damping"] == damping], value).assign(value=df[value])
        for ax, name in zip(line, names, strict=True):
            others.plot_by_block(part[part["model"] == name], ax=ax)
        line[0].set_ylabel(label)
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name)
        ax.legend(frameon=False, loc="upper left")
    for ax in axes[-1]:
        ax.set_xlabel(RUN)
    _outer(axes)
    return drawn


def _shown(df: pd.DataFrame) -> list[str]:
    return [name for name in SHOWN if name in set(df["model"])]


def _block(first: int, n_layers: int) -> str:
    return f"layer {first}" if n_layers == 1 else f"layers {first}, {first + n_layers - 1}"


def _outer(axes: np.ndarray) -> None:
    """Labels of y at the left only."""
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")


def _legend(drawn: MatplotlibFigure, shown: list[Axes]) -> None:
    handles = [handle for ax in shown for handle in ax.get_legend_handles_labels()[0]]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, columnspacing=1.4)


# --- what is shown ---

CHAINS = """Specimens: 24 antibody chains that antiberty sampled (heavy ones; for sapiens-light light ones), errors
over chains, Student's t: they tell where a model looks, not how well it knows nature, and antiberty is at home on
them"""

EXHIBITS = (
    Exhibit(
        "attention-of-others",
        "Others' layers look away from masked keys, our loops towards",
        ("attention-of-others",),
        attention_of_others,
        f"""Where masked queries look, by layer (and loop), in three pretrained models of other people, which are
        masked-language models of antibody chains without loops, beside our two text models (seed 0). (a to e)
        mean mass on other masked and on clean keys at half masked, heads averaged; dotted: chance, the mean
        share of such keys. (f to j) log-odds of a masked against a clean key, self excluded; 0 = the head does
        not care. Bands: 95%. Ours: {TEXT}. {CHAINS}. They were trained with 15% of tokens masked; half masked is
        extrapolation to them, so both are shown. If layers of models without loops turned to masked keys as our
        looped layer does, that turn would be no mark of looping; models, data and training differ at once, so
        that a difference alone proves nothing about loops. {OURS}""",
    ),
    Exhibit(
        "training-free-of-others",
        "Repeating others' layers four times in full steps costs NELBO",
        ("training-free-of-others",),
        training_free_of_others,
        f"""Pretrained models that were never looped, with middle layers run S times, without training for it:
        blocks by their layers. (a to d) change of the NELBO against S = 1 in full steps; (e to h) in steps damped
        by 1/S (another scale); (i to l) rise of the masked-to-masked log-odds from the first to the last damped
        loop at half masked, self excluded. Bands: 95%, paired by sequence and mask; one mask a sequence, no
        correction for the number of blocks. sotu-base: {TEXT}. {CHAINS}; their NELBO averages over all mask
        ratios, of which training knew 15% only. Training-free looping is said to help; curves above 0 say that
        it does not here. If log-odds rise, a rise in looped models says nothing about training with loops.
        Definitions are ours.""",
    ),
)
