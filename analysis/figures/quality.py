"""Figures of quality: learning curves, NELBO and solve rate by number of loops."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from analysis import zoo
from analysis.figures.figure import PANELS, SEEDS, Figure, Tables
from analysis.plots import quality
from analysis.plots.style import PAGE

ARMS = ("base", "deep", "loop")


def _arms(df: pd.DataFrame, task: str) -> pd.DataFrame:
    return df[(df["task"] == task) & df["arm"].isin(ARMS)]


def learning_curves(loaded: Tables) -> MatplotlibFigure:
    """Validation NELBO against training FLOPs."""
    df = loaded["learning-curves"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    for ax, (model, title) in zip(axes, PANELS, strict=True):
        quality.plot_learning_curves(_arms(df, model.split("-")[0]), ax=ax)
        ax.set_title(title)
        ax.legend(frameon=False)
    return drawn


def nll_by_loops(loaded: Tables) -> MatplotlibFigure:
    """NELBO by S of all arms, and its paired change from S = 1 for the looped one."""
    df, references = loaded["nll-by-loops"], loaded["references"]
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.4), layout="constrained")
    for row, (model, title) in zip(axes, PANELS, strict=True):
        task = model.split("-")[0]
        part = _arms(df, task)
        looped = part[part["arm"] == "loop"]
        quality.plot_nll_by_loops(part, ax=row[0])
        row[0].set_title(f"{title}: level")
        quality.plot_change_by_loops(looped, ax=row[1])
        row[1].set_title(f"{title}: loop, change from S = 1")
        bottom = part["nll"].min()
        top = max(looped["nll"].max(), part.loc[part["n_loops"] == 1, "nll"].max())
        if task == "sotu":
            bigram = references.loc[references["reference"] == "bigram", "nll"].iloc[0]
            row[0].axhline(bigram, color="#444444", linewidth=0.8, linestyle=":")
            row[0].annotate(
                f"bigram {bigram:.2f}",
                (0.36, bigram),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=6.5,
            )
            top, bottom = max(top, bigram), min(bottom, bigram)
        row[0].set_ylim(bottom - 0.08 * (top - bottom), top + 0.25 * (top - bottom))
        row[0].legend(frameon=False, loc="lower right" if task == "sotu" else "upper center")
    return drawn


def sudoku_solve_rate(loaded: Tables) -> MatplotlibFigure:
    """One-shot solve rate by S."""
    drawn, ax = plt.subplots(figsize=(3.6, 2.6), layout="constrained")
    df = loaded["sudoku-solve-rate"]
    quality.plot_solve_rate(_arms(df[df["n_clues"] == 20], "sudoku"), ax=ax)
    ax.legend(frameon=False, loc="lower right")
    ax.set_title("6x6 Sudoku, 16 of 36 cells hidden")
    return drawn


def gain_by_noise(loaded: Tables) -> MatplotlibFigure:
    """Where looping gains: by mask ratio, at several loop counts."""
    df = _of_models(loaded["noise-level"])
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    for ax, (model, title) in zip(axes, PANELS, strict=True):
        part = df[df["task"] == model.split("-")[0]]
        quality.plot_gain_by_noise(part, zoo.s_max(model), ax=ax)
        n = part["seed"].nunique()
        ax.set_title(f"{title} ({n} seed{'s' if n > 1 else ''})")
        ax.legend(frameon=False)
    return drawn


def _of_models(df: pd.DataFrame) -> pd.DataFrame:
    """With the columns task, arm and seed of each row's model."""
    known = {item.name: item for item in zoo.shipped()}
    models = [known[name] for name in df["model"]]
    return df.assign(
        task=[item.task for item in models], arm=[item.arm for item in models], seed=[item.seed for item in models]
    )


def zero_shot(loaded: Tables) -> MatplotlibFigure:
    """Seven corpora that the text models never saw."""
    df = loaded["zero-shot"]
    most = zoo.s_max("sotu-loop")
    wanted = [("sotu-base", 1), *(("sotu-loop", count) for count in (1, most, 2 * most))]
    parts = [
        df[(df["model"] == model) & (df["n_loops"] == count)].assign(label=f"{model.split('-')[1]}, S = {count}")
        for model, count in wanted
    ]
    drawn, ax = plt.subplots(figsize=(PAGE * 0.7, 3.2), layout="constrained")
    quality.plot_zero_shot(pd.concat(parts), ax=ax)
    drawn.legend(loc="outside lower center", ncols=4, frameon=False)
    return drawn


def training_free(loaded: Tables) -> MatplotlibFigure:
    """Looping the middle of base models: NELBO, and masked-to-masked log-odds."""
    df = _of_models(loaded["training-free"])
    df = df[(df["first_layer"] == 1) & (df["n_layers"] == 1)]
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.2), layout="constrained", sharex=True)
    for row, (model, title) in zip(axes, PANELS, strict=True):
        part = df[df["task"] == model.split("-")[0]]
        for ax, value, label in ((row[0], "change", "NELBO less that at S = 1 (nats)"),
                                 (row[1], "rise", "rise of masked : clean log-odds")):  # fmt: skip
            quality.plot_training_free(part, value, ax=ax)
            ax.set(title=f"{title}: base models", ylabel=label)
            if ax.get_subplotspec().is_first_row():
                ax.set_xlabel("")
    axes[0, 0].legend(frameon=False)
    return drawn


FIGURES = (
    Figure(
        "learning-curves",
        ("learning-curves",),
        learning_curves,
        f"""Validation NELBO of EMA weights against training FLOPs (3 x forward, warm-up then constant rate),
        each arm at S_max of its training; loop and base at equal size, all at equal budgets. 128 validation
        sequences, two masks each. {SEEDS} The paper: the looped model reaches the base model's NLL with fewer
        FLOPs; a loop curve that stays above the base curve counts against it.""",
    ),
    Figure(
        "nll-by-loops",
        ("nll-by-loops", "references"),
        nll_by_loops,
        f"""Test NELBO by number of loops, to 3 x S_max (dash-dotted: S_max of training). Base models were
        trained without looping at the same size and training FLOPs; their curve beyond S = 1 is looping
        without training for it and may leave the panel. Left: level. Right: paired change from S = 1. 1,000
        grids of unseen classes; all 1,957 test blocks of 8 unseen speeches; one mask a sequence. {SEEDS} The
        paper: more loops, lower NLL, also beyond S_max, and S = 1 worse than the base model.""",
    ),
    Figure(
        "sudoku-solve-rate",
        ("sudoku-solve-rate",),
        sudoku_solve_rate,
        f"""Share of 6x6 puzzles solved in one shot (every hidden cell filled at once with its best symbol; any
        valid completion counts), 16 of 36 cells hidden, 500 grids of unseen classes. {SEEDS} base: same size,
        same training FLOPs, no looping in training; deep: the looped layer untied. The puzzle set and the one-
        shot protocol are ours; the paper's are not public. A loop curve that does not rise above the base
        arm's S = 1 would count against the claim that looping helps.""",
    ),
    Figure(
        "gain-by-noise",
        ("noise-level",),
        gain_by_noise,
        f"""Gain of looping over S = 1 (nats per masked token, paired by sequence and mask) by mask ratio, at
        several loop counts, looped models. 1,000 grids of unseen classes; all test blocks of 8 unseen
        speeches; two masks each. {SEEDS} The paper reports the largest gain at intermediate noise; a curve
        that peaks at an end counts against it.""",
    ),
    Figure(
        "zero-shot",
        ("zero-shot",),
        zero_shot,
        """NELBO on seven corpora that the text models never saw, at most 512 windows of 64 tokens each; bars:
        95% over documents. Stand-ins: quac-wiki for WikiText, headlines for AG News, xsum for LM1B, pubmed
        abstracts. Base and loop of equal size and training FLOPs, one seed. The paper: the looped model is
        better on all seven at S_max; one corpus on which base is ahead counts against it.""",
    ),
    Figure(
        "training-free",
        ("training-free",),
        training_free,
        f"""Models that were never looped, with their middle layer run S times: in full steps and damped by 1/S.
        Left: change of the NELBO. Right: rise of the masked-to-masked log-odds from the first to the last loop
        at half masked, self excluded. {SEEDS} If the log-odds rise here, too, a rise in looped models says
        nothing about training with loops. Definitions are ours.""",
    ),
)
