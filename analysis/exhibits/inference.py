"""Figures of inference: quality by number of loops."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.answers import (
    Answer,
    Gate,
    NotRun,
    answer_of,
    between_arms,
    by_document,
    by_rank,
    by_t,
    ends,
    given_break,
    left_plateau,
    looped,
    nll,
    on_few,
    rows_of,
)
from loopmdm.analysis.exhibits.registry import (
    MEANS,
    SEEDS,
    Exhibit,
    Reading,
    Tables,
    compared,
    elsewhere,
    of_models,
    panels,
)
from loopmdm.analysis.exhibits.training import depth_has_room
from loopmdm.analysis.numbers import contrasts
from loopmdm.analysis.numbers.estimate import across_seeds
from loopmdm.analysis.plots import quality
from loopmdm.analysis.plots.style import PAGE


def nll_by_loops(loaded: Tables) -> MatplotlibFigure:
    """NELBO by S of all arms, and its paired change from S = 1 for the looped one."""
    df, references = loaded["nll-by-loops"], loaded["references"]
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.4), layout="constrained")
    for row, panel in zip(axes, panels(), strict=True):
        task = panel.run.task
        part = compared(df, task)
        looped = part[part["arm"] == "loop"]
        quality.plot_nll_by_loops(across_seeds(part, "nll", BY_LOOPS, "nll_se"), ax=row[0])
        row[0].set_title(f"{panel.title}: level")
        change = across_seeds(looped, "change_from_s1", BY_LOOPS, "change_from_s1_se")
        quality.plot_change_by_loops(change, ax=row[1])
        row[1].set_title(f"{panel.title}: loop, change from S = 1")
        others = []
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
            others.append(bigram)
        _reach(part, row[0], *others)
        row[0].legend(frameon=False, loc="lower right" if task == "sotu" else "upper center")
    return drawn


BY_LOOPS = ("task", "arm", "n_loops")
"""What training seeds share in tables by number of loops."""


def _reach(df: pd.DataFrame, ax: Axes, *others: float) -> None:
    """Limits for `nll` by the looped arm, all arms at S = 1, and `others`: base past S = 1 may leave the panel."""
    known = df[(df["arm"] == "loop") | (df["n_loops"] == 1)]["nll"]
    bottom, top = min([known.min(), *others]), max([known.max(), *others])
    ax.set_ylim(bottom - 0.08 * (top - bottom), top + 0.25 * (top - bottom))


def other_nll(loaded: Tables) -> MatplotlibFigure:
    """NELBO by S on the tasks beside the two main ones."""

    def plot(df: pd.DataFrame, *, ax: Axes) -> Axes:
        quality.plot_nll_by_loops(df, ax=ax)
        _reach(df, ax)
        return ax

    return elsewhere(across_seeds(loaded["nll-by-loops"], "nll", BY_LOOPS, "nll_se"), plot, "test NELBO")


def sudoku_solve_rate(loaded: Tables) -> MatplotlibFigure:
    """One-shot solve rate by S, 6x6 and 9x9."""
    df = loaded["sudoku-solve-rate"]
    shown = [panel for panel in BOARD_PANELS if panel[0] in set(df["task"])]
    size = (PAGE * len(shown) / 2, 2.6)
    drawn, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    for ax, (task, title) in zip(axes[0], shown, strict=True):
        part = compared(df, task)
        quality.plot_solve_rate(across_seeds(part, "solve_rate", BY_LOOPS), ax=ax)
        ax.legend(frameon=False, loc="best")
        ax.set_title(title + (" (next to none solved)" if (part["high"] <= NEXT_TO_NONE).all() else ""))
    return drawn


NEXT_TO_NONE = 0.02
"""Where all intervals end below this share of boards, the panel says so."""
BOARD_PANELS = (("sudoku", "6x6, 16 of 36 hidden"), ("sudoku9", "9x9, 21 of 81 hidden"))


def gain_by_noise(loaded: Tables) -> MatplotlibFigure:
    """Where looping gains: by mask ratio, at several loop counts."""
    df = of_models(loaded["noise-level"])
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    for ax, panel in zip(axes, panels(), strict=True):
        part = df[df["task"] == panel.run.task]
        means = across_seeds(part, "gain", ("n_loops", "mask_ratio"), "gain_standard_error")
        quality.plot_gain_by_noise(means, panel.run.s_max, ax=ax)
        n = part["seed"].nunique()
        ax.set_title(f"{panel.title} ({n} seed{'s' if n > 1 else ''})")
        ax.legend(frameon=False)
    return drawn


# --- answers to claims ---


CURVES = ("nll-by-loops", "learning-curves")
DOCUMENTED = (*CURVES, "nll-by-document")


def _better_than(arm: str) -> Callable[[str], Answer]:
    def answer(task: str) -> Answer:
        paired = "change_from_base" if arm == "base" else None
        return given_break(task, ends(task, "loop"), ends(task, arm), paired)

    return answer


def _leaves_the_plateau(task: str) -> Answer:
    arms = [ends(task, role)["model"] for role in ("loop", "base")]
    if not all(map(len, arms)):
        raise NotRun
    left = [left_plateau(models, task).tolist() for models in arms]
    estimate, low, high = contrasts.shares(*left)
    told = f"{sum(left[0])} of {len(left[0])} looped runs, {sum(left[1])} of {len(left[1])} base runs"
    return Answer(
        estimate, low, high, len(left[0]), sum(map(len, left)),
        lambda margin: contrasts.shares_p(*left) if margin == 0 else float("nan"), told, len(left[1]),
    )  # fmt: skip


def _one_loop(task: str) -> Answer:
    return by_rank(nll(task, "loop", 1), nll(task, "base", 1), "nll")


def _by_s(task: str) -> pd.DataFrame:
    """Test NELBO of the looped runs: a row a model, a column a loop count."""
    df = tables.load("nll-by-loops")
    df = df[(df["task"] == task) & (df["arm"] == "loop")]
    if df.empty:
        raise NotRun
    return df.pivot_table(index="model", columns="n_loops", values="nll")


def _of_runs(task: str, values: pd.Series) -> Answer:
    """Over looped runs; one run alone has no interval here."""
    df = nll(task, "loop", 1)
    return answer_of(values.to_numpy(), np.full(len(values), np.nan), int(df["n"].iloc[0]), len(values))


def _in_nats(task: str, what: Callable[[pd.DataFrame], pd.Series]) -> Answer:
    """A difference of loop counts over looped runs, and over the documents where those are few."""
    rows = nll(task, "loop", 1)
    values, read = what(_by_s(task)), by_document(rows)
    if read is None or len(values) < 2:
        return _of_runs(task, values)
    seeds = contrasts.contrast((values.to_numpy(),), (1,))
    n = int(rows["n"].iloc[0])
    return by_t(*on_few(seeds, what(read[0]), read[1]), len(values), n)


def _more_loops(task: str) -> Answer:
    most = looped(task)
    return _in_nats(task, lambda values: values[most] - values[1])


def _monotone(task: str) -> Answer:
    """The largest rise from one loop count that was read to the next, up to S_max."""
    values = _by_s(task)
    return _of_runs(task, values[[s for s in values if s <= looped(task)]].diff(axis=1).max(axis=1))


def _beyond(task: str) -> Answer:
    most = looped(task)
    return _in_nats(task, lambda values: values[2 * most] - values[most])


def _most_by_half(task: str) -> Answer:
    """In nats, so that a gain near 0 is divided by nothing."""
    most = looped(task)
    return _in_nats(task, lambda values: values[1] - values[most // 2] - 0.5 * (values[1] - values[most]))


def _loops_to_beat_base(task: str) -> Answer:
    """The smallest S at which a looped run is below the mean of base at S = 1, as a share of S_max."""
    values, most, base = _by_s(task), looped(task), nll(task, "base", 1)["nll"].mean()
    below = values[[s for s in values if s <= most]] < base
    first = below.idxmax(axis=1).where(below.any(axis=1))
    return _of_runs(task, first.astype(float) / most)


def _some_beat_base(task: str) -> Gate:
    values, base = _by_s(task), nll(task, "base", 1)["nll"].mean()
    below = (values[[s for s in values if s <= looped(task)]] < base).any(axis=1)
    return Gate(
        bool(below.any()), f"{below.sum()} of {len(below)} looped runs are below the mean of base at any S"
    )


def _solves_beyond(task: str) -> Answer:
    df, most = tables.load("sudoku-solve-rate"), looped(task)
    df = df[(df["task"] == task) & (df["arm"] == "loop")]
    values = df.pivot_table(index="model", columns="n_loops", values="solve_rate")
    return _of_runs(task, values[2 * most] - values[most])


def _intermediate_noise(task: str) -> Answer:
    df = rows_of("noise-level", task, n_loops=looped(task))
    values = []
    for _, part in df.groupby("model"):
        low, mid, high = (
            part[(part["mask_ratio"] > a) & (part["mask_ratio"] < b)]["gain"].mean()
            for a, b in ((0, 0.3), (0.3, 0.7), (0.7, 1))
        )
        values.append(mid - max(low, high))
    return answer_of(np.array(values), np.full(len(values), np.nan), int(df["n"].min()), 1)


def _solves(task: str) -> Answer:
    df = tables.load("sudoku-solve-rate")
    df = df[df["task"] == task]
    return between_arms(
        df[(df["arm"] == "loop") & (df["n_loops"] == looped(task))],
        df[(df["arm"] == "base") & (df["n_loops"] == 1)],
        "solve_rate",
    )


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "nll-by-loops",
        "The first loops help; beyond S_max text gets worse",
        ("nll-by-loops", "references"),
        nll_by_loops,
        f"""Test NELBO by number of loops, to 3 x S_max (dash-dotted: S_max of training), base models to S_max.
        These were trained without looping at the same size and training FLOPs; their curve beyond S = 1 is
        looping without training for it and may leave the panel. (a, c) level. (b, d) paired change from S = 1.
        1,000 grids of unseen classes; all 1,957 test blocks of 8 unseen speeches; one mask a sequence. {SEEDS}
        The paper: more loops, lower NLL, also beyond S_max, and S = 1 worse than the base model.""",
        (
            Reading("better-at-equal-flops", _better_than("base"), DOCUMENTED, depth_has_room),
            Reading("better-than-deeper", _better_than("deep"), CURVES, depth_has_room),
            Reading("leaves-the-plateau", _leaves_the_plateau, CURVES),
            Reading("one-loop-is-worse", _one_loop, ("nll-by-loops",)),
            Reading("more-loops-are-better", _more_loops, ("nll-by-loops", "nll-by-document")),
            Reading("monotone-in-loops", _monotone, ("nll-by-loops",)),
            Reading("needs-many-loops-to-beat-base", _loops_to_beat_base, ("nll-by-loops",), _some_beat_base),
            Reading("better-beyond-s-max", _beyond, ("nll-by-loops", "nll-by-document")),
            Reading("most-by-half", _most_by_half, ("nll-by-loops", "nll-by-document")),
        ),
    ),
    Exhibit(
        "nll-by-loops-elsewhere",
        "A few loops help; on most tasks base stays below",
        ("nll-by-loops",),
        other_nll,
        f"""Test NELBO by number of loops on the other tasks, to 3 x S_max (dash-dotted: S_max of training). One
        mask a sequence; base models to S_max, untrained for it beyond S = 1, where their curve may leave the
        panel. 1,000 test grids, expressions, trees or chains each; all problems of unseen templates, which
        nobody learned (read to S_max only, base and deep at S = 1); all blocks of unseen documents. {SEEDS} Axes
        differ between panels; a band that fills one is wider than it. The paper: more loops, lower NLL, on every
        corpus; a loop curve that does not fall, or ends above base at S = 1, counts against it, except on the
        chain, where nothing is to be gained.""",
    ),
    Exhibit(
        "sudoku-solve-rate",
        "Loops solve more 6x6 boards than base; 9x9 stays unsolved",
        ("sudoku-solve-rate",),
        sudoku_solve_rate,
        f"""Share of puzzles solved in one shot (every hidden cell filled at once with its best symbol; any valid
        completion counts), 500 grids of unseen classes (6x6: up to relabelling; 9x9: no symmetry of the board
        joins them to training). {SEEDS} A panel whose intervals all end below 2% is called next to none
        solved: it says nothing about looping. base: same size, same training FLOPs, no looping in training;
        deep: the looped layer untied. The puzzle sets and the one-shot protocol are ours; the paper's are not
        public. A loop curve that does not rise above the base arm's S = 1 would count against the claim that
        looping helps.""",
        (
            Reading("solves-what-shallow-cannot", _solves, ("sudoku-solve-rate",)),
            Reading("solves-more-beyond-s-max", _solves_beyond, ("sudoku-solve-rate", "nll-by-loops")),
        ),
    ),
    Exhibit(
        "gain-by-noise",
        "Looping gains most at middle noise on Sudoku; text undecided",
        ("noise-level",),
        gain_by_noise,
        f"""Gain of looping over S = 1 (nats per masked token, paired by sequence and mask) by mask ratio, at
        several loop counts, looped models. 1,000 grids of unseen classes; all test blocks of 8 unseen
        speeches; one mask each. {MEANS} The band is that of S_max. The paper reports the largest gain at
        intermediate noise; a curve that peaks at an end counts against it.""",
        (Reading("intermediate-noise", _intermediate_noise, ("noise-level",)),),
    ),
)
