"""Figures of adaptive stopping."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits.answers import Answer, answer_of, rows_of
from loopmdm.analysis.exhibits.registry import GRIDS, TEXT, Exhibit, Reading, Tables, panels
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.plots import stopping
from loopmdm.analysis.plots.style import COLUMN, PAGE


def stopping_frontier(loaded: Tables) -> MatplotlibFigure:
    """Loss against FLOPs for some rules, fixed S, the schedule and the oracle."""
    df = loaded["stopping-frontier"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.9), layout="constrained")
    for ax, panel in zip(axes, panels(), strict=True):
        stopping.plot_frontier(panel.of(df[df["mask_ratio"].isna()]), ax=ax)
        ax.set_title(panel.title)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return drawn


def loops_used(loaded: Tables) -> MatplotlibFigure:
    """Loops under state-delta along sampling, and by what kind of position."""
    steps, usage = (
        with_interval(loaded[name], "value", "standard_error") for name in ("stopping-by-step", "stopping-usage")
    )
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.6), layout="constrained", width_ratios=[1.2, 1])
    for row, panel in zip(axes, panels(), strict=True):
        part = panel.of(steps)
        most = int(part["max_loops"].iloc[0])
        stopping.plot_loops_by_step(part, most, ax=row[0])
        stopping.plot_usage(panel.of(usage), most, ax=row[1])
        row[0].set_title(f"{panel.title}: along sampling")
        row[1].set_title(f"{panel.title}: masked test data")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return drawn


def sampling_savings(loaded: Tables) -> MatplotlibFigure:
    """FLOPs and wall-clock of whole sampling runs under stopping, beside fixed S."""
    df = loaded["stopping-in-sampling"]
    df = df.assign(flops_ratio=df["flops"] / df.groupby("model")["flops"].transform("first"))
    df = df[df["rule"] != "fixed"].drop_duplicates(["model", "rule"])
    names = {"state-delta": "sequences", "state-delta token": "tokens"}
    titles = {panel.model: panel.title for panel in panels()}
    label = df["model"].map(titles) + ": " + df["rule"].map(names) + "\nstop"
    drawn, ax = plt.subplots(figsize=(COLUMN * 1.3, 2.5), layout="constrained")
    stopping.plot_savings(df.assign(label=label), ax=ax)
    drawn.legend(loc="outside lower center", ncols=2, frameon=False)
    return drawn


# --- answers to claims ---


def _verdict_rows(task: str) -> pd.DataFrame:
    """State-delta of every looped model, in the order of seeds."""
    return rows_of("stopping-verdicts", task, rule="state-delta").sort_values("seed")


def _halves_loops(task: str) -> Answer:
    """At the threshold chosen on validation, whether or not the test bears it out: that stands beside it."""
    rows = _verdict_rows(task)
    share, errors = rows["mean_loops"] / rows["of_loops"], rows["mean_loops_se"] / rows["of_loops"]
    lost = ", ".join(f"{value:.4f}" for value in rows["increase"])
    told = f"nats lost by it on test, by run: {lost}"
    n, n_units = int(rows["n"].iloc[0]), int(rows["n_units"].iloc[0])
    return answer_of(share.to_numpy(), errors.to_numpy(), n, n_units, told)


def _schedule(task: str) -> Answer:
    """The schedule by mask ratio that does best on validation, against fixed S at its FLOPs."""
    rows = rows_of("stopping-verdicts", task, rule="noise-schedule")
    n, n_units = int(rows["useful_n"].iloc[0]), int(rows["n_units"].iloc[0])
    return answer_of(rows["against_fixed"].to_numpy(), rows["against_fixed_se"].to_numpy(), n, n_units)


def _knows_where(task: str) -> Answer:
    rows = _verdict_rows(task)
    contrasts = rows[[f"against_{name}" for name in ("fixed", "schedule", "shuffled")]].to_numpy()
    errors = rows[[f"against_{name}_se" for name in ("fixed", "schedule", "shuffled")]].to_numpy()
    worst = contrasts.argmax(axis=1)  # the control that comes nearest, or wins
    index = np.arange(len(rows))
    return answer_of(
        contrasts[index, worst], errors[index, worst], int(rows["n"].iloc[0]), int(rows["n_units"].iloc[0])
    )


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "stopping-frontier",
        "A schedule by noise saves FLOPs; watching the state does not",
        ("stopping-frontier",),
        stopping_frontier,
        f"""NELBO against forward FLOPs when sequences stop by a rule, each at 20 thresholds chosen on
        validation, beside fixed S, loops scheduled by mask ratio and an oracle that sees the answer; up to 2 x
        S_max loops. What a rule reads is counted. {GRIDS}; {TEXT}; two masks each; one seed of training. A rule
        that lies on or above the fixed or the scheduled line saves nothing by looking at the sequence. The
        vertical range is that of fixed S. The paper stops on small state changes; its threshold and scope are
        not public, ours are the masked positions of a sequence. The verdicts are over all test sequences and
        five seeds.""",
        (
            Reading("stopping-halves-loops", _halves_loops, ("stopping-verdicts",)),
            Reading("stopping-knows-where", _knows_where, ("stopping-verdicts",)),
            Reading("schedule-over-noise", _schedule, ("stopping-verdicts",)),
        ),
    ),
    Exhibit(
        "loops-used",
        "Hard positions get fewer loops, not more",
        ("stopping-by-step", "stopping-usage"),
        loops_used,
        f"""Loops used under state-delta at the middle of its thresholds, S_max at most (dotted). (a, c) before
        each denoising step of the model's own samples, 64 of them. (b, d) on masked test data by mask ratio, by
        the loss at the position (thirds) and by how frequent the true token is (thirds), where whole sequences
        stop and where tokens stop. {GRIDS}; {TEXT}; bars: 95%. One seed of training. If a rule spent loops on
        what is hard, high losses would use more of them. Definitions are ours.""",
    ),
    Exhibit(
        "sampling-savings",
        "Stopping early saves FLOPs, seldom time",
        ("stopping-in-sampling",),
        sampling_savings,
        """FLOPs and time of whole sampling runs with state-delta at the middle of its thresholds, as shares
        of runs with all S_max loops. 64 samples. Text in 32 random steps, Sudoku in 20 by confidence with 16 of
        36 cells given. Times are medians on two CPU cores and one machine. Quality is in the table: solved
        puzzles, unigram entropy and distinct pairs, each against all loops. A time above 1 is no saving,
        whatever the FLOPs. The paper: 12 loops become about 5. One seed of training.""",
    ),
)
