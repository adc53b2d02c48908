"""Figures of training: learning curves."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as MatplotlibFigure

from analysis.figures.entry import PANELS, SEEDS, Figure, Tables, compared
from analysis.plots import quality
from analysis.plots.style import PAGE


def learning_curves(loaded: Tables) -> MatplotlibFigure:
    """Validation NELBO against training FLOPs."""
    df = loaded["learning-curves"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    for ax, (model, title) in zip(axes, PANELS, strict=True):
        quality.plot_learning_curves(compared(df, model.split("-")[0]), ax=ax)
        ax.set_title(title)
        ax.legend(frameon=False)
    return drawn


TASKS = (("sudoku", "Sudoku 6x6"), ("sotu", "text (sotu)"))


def flops_to_target(loaded: Tables) -> MatplotlibFigure:
    """How many times fewer FLOPs an arm needs for what another one reaches."""
    df = loaded["flops-to-target"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.7), layout="constrained", sharey=True)
    for ax, (task, title) in zip(axes, TASKS, strict=True):
        quality.plot_flops_ratio(df[df["task"] == task], ax=ax)
        ax.set_title(title)
    axes[0].set_ylabel("FLOPs of the second / of the first\n(above 1: the first needs fewer)")
    return drawn


def arms(loaded: Tables) -> MatplotlibFigure:
    """Same size, deeper, looped: where each ends at equal training FLOPs, seed by seed."""
    nll, solve = loaded["nll-by-loops"], loaded["sudoku-solve-rate"]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.5), layout="constrained")
    for ax, (task, title) in zip(axes, TASKS, strict=False):
        part = compared(nll, task)
        quality.plot_arms(part[part["n_loops"] == part["max_loops"]], "nll", ax=ax)
        ax.set(title=title, ylabel="test NELBO (nats per token)")
    part = compared(solve[solve["n_clues"] == 20], "sudoku")
    most = nll.groupby("model")["max_loops"].first()
    part = part[part["n_loops"] == part["model"].map(most)]
    quality.plot_arms(part, "solve_rate", ax=axes[2])
    axes[2].set(title="Sudoku 6x6, one shot", ylabel="puzzles solved", ylim=(0, 1))
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
        "flops-to-target",
        ("flops-to-target",),
        flops_to_target,
        """How many times fewer training FLOPs the first arm needs for the NELBO that the second one reaches
        after a quarter, half, three quarters and all of its budget (numbers at the foot, %; the mean over its
        seeds; at 100 what every one of its runs reaches). Bars: 95% over training seeds; no bar: one seed on a
        side, or seeds that never got there. Crosses: not reached by all seeds of the first arm (how many did),
        or not by all of the second's own. Budgets are equal; at a small share all arms are on the same
        plateau. The paper: up to 3.3 times fewer FLOPs for loop against base at the end of the budget; a ratio
        below 1 at 100% counts against it.""",
    ),
    Figure(
        "arms",
        ("nll-by-loops", "sudoku-solve-rate"),
        arms,
        """The arms at the end of equal training FLOPs, a mark a training seed (their number in brackets), bars:
        means. base: the looped model's size, not looped; deep: its looped layer untied, so larger, of the
        looped model's mean compute a step; loop at S_max. Test NELBO on 1,000 grids of unseen classes and on
        all 1,957 blocks of 8 unseen speeches, one mask a sequence; one-shot with 16 of 36 cells hidden on 500
        grids. The paper: looped models beat same-size and deeper ones; a higher NELBO, or fewer solved, than
        base or deep counts against it.""",
    ),
)
