"""Figures of tasks whose answer is known."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.answers import Answer, Gate, answer_of, looped, over_runs, rows_of, settled_runs
from loopmdm.analysis.exhibits.registry import MEANS, Exhibit, Reading, Tables
from loopmdm.analysis.numbers.estimate import across_seeds
from loopmdm.analysis.plots import known
from loopmdm.analysis.plots.style import NULL, PAGE, mark_trained
from loopmdm.model.zoo.runs import Zoo


def sudoku_boards(loaded: Tables) -> MatplotlibFigure:
    """What is wrong with the boards after every loop, and what each loop repairs."""
    df = loaded["sudoku-boards"]
    means = across_seeds(df.dropna(subset=["value"]), "value", ("metric", "loop"), "standard_error")
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.9), layout="constrained")
    for ax, looks, title in zip(axes, (known.METRIC_STYLE, known.CHANGE_STYLE),
                                ("wrong after each loop", "changed by each loop"), strict=True):  # fmt: skip
        known.plot_metrics(means, looks, ax=ax)
        mark_trained(ax, Zoo.shipped().first("sudoku").s_max, df["loop"].max() + 1)
        ax.set_title(f"6x6 Sudoku: {title} ({df['model'].nunique()} seeds)")
        ax.legend(frameon=False)
    return drawn


def sudoku_orders(loaded: Tables) -> MatplotlibFigure:
    """Solve rate by generation order at S = 1 and S_max."""
    df = loaded["sudoku-orders"]
    drawn, ax = plt.subplots(figsize=(PAGE * 0.7, 2.7), layout="constrained")
    known.plot_orders(df[df["kind"] == "rate"], ax=ax)
    ax.set_title("6x6 Sudoku, 26 of 36 cells hidden")
    drawn.legend(frameon=False, loc="outside lower center", ncols=2)
    return drawn


def excess_kl(loaded: Tables) -> MatplotlibFigure:
    """How far each loop is from the exact posterior, by hops, and the nearest round of belief propagation."""
    excess, rounds = loaded["excess-kl"], loaded["belief-rounds"]
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 5.6), layout="constrained")
    for row, (task, title) in zip(axes, (("tree", "tree"), ("markov", "chain (control)")), strict=True):
        part = excess[excess["task"] == task]
        known.plot_excess(across_seeds(part, "excess_kl", ("arm", "n_loops", "hops")), ax=row[0])
        seeds = part.loc[part["arm"] == "loop", "seed"].nunique()
        first = Zoo.shipped().first(task)
        row[0].set_title(f"{title}: {seeds} seed{'s' if seeds > 1 else ''}, $S_{{max}}$ = {first.s_max}")
        own = rounds[(rounds["model"] == first.name) & (rounds["nominal_mask_ratio"] == 0.5)]
        known.plot_rounds(own, ax=row[1])
        row[1].set_title(f"{title}: nearest rounds, seed 0")
    drawn.legend(handles=known.round_handles(), loc="outside lower right", frameon=False)
    return drawn


def arithmetic_steps(loaded: Tables) -> MatplotlibFigure:
    """How far a loop carries the evaluation of a tree: excess by steps, and steps in reach by S."""
    df, first = _arithmetic(loaded["excess-kl"]), Zoo.shipped().first("arithmetic")
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 3.3), layout="constrained", width_ratios=[1.3, 1])
    own = df[df["seed"] == first.seed]
    known.plot_steps(across_seeds(own, "excess_kl", ("arm", "n_loops", "hops"), "standard_error"), ax=axes[0])
    axes[0].axhline(HALF_A_VALUE, **NULL, label="half of a guess")
    known.plot_reach(across_seeds(steps_in_reach(df), "steps", ("arm", "n_loops")), first.s_max, ax=axes[1])
    for ax, title in zip(
        axes, (f"what is missing (seed {first.seed})", "where it is half of a guess"), strict=True
    ):
        ax.set_title(f"arithmetic: {title}")
    axes[1].legend(frameon=False)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return drawn


def arithmetic_edges(loaded: Tables) -> MatplotlibFigure:
    """What is missing by steps where later loops may not hear masked, or clean, positions; a panel a seed."""
    df = loaded["excess-kl-cut"]
    seeds = sorted(df["seed"].unique())
    size = (PAGE, 0.5 + 2.1 * -(-len(seeds) // 2))
    drawn, axes = plt.subplots(-(-len(seeds) // 2), 2, figsize=size, layout="constrained", squeeze=False)
    for ax, seed in zip(axes.flat, seeds, strict=False):
        own = across_seeds(df[df["seed"] == seed], "excess_kl", ("edges", "n_loops", "hops"), "standard_error")
        known.plot_cuts(own, ax=ax)
        ax.set_title(f"arithmetic, seed {seed}")
    for ax in axes.flat[len(seeds) :]:
        ax.set_axis_off()
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    for ax in axes[:, 1]:
        ax.set_ylabel("")
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _arithmetic(df: pd.DataFrame) -> pd.DataFrame:
    return df[df["task"] == "arithmetic"]


HALF_A_VALUE = math.log(7) / 2
"""Half of what a uniform guess among seven residues lacks, nats: below it a value counts as in reach."""


def steps_in_reach(df: pd.DataFrame) -> pd.DataFrame:
    """Steps of evaluation at which the mean excess first crosses half of a guess, by model and S.

    `df`: model arm seed n_loops hops excess_kl, as the table excess-kl. Straight between whole steps, from 0 at 0
    steps; where it is not crossed, the most steps there are. Columns: model arm seed n_loops steps.
    """
    by = ["model", "arm", "seed", "n_loops"]
    rows = [(*key, _crossing(part.sort_values("hops"))) for key, part in df.groupby(by)]
    return pd.DataFrame(rows, columns=[*by, "steps"])


def _crossing(part: pd.DataFrame) -> float:
    steps = np.concatenate([[0.0], part["hops"].to_numpy(float)])
    excess = np.concatenate([[0.0], part["excess_kl"].to_numpy(float)])
    above = np.flatnonzero(excess >= HALF_A_VALUE)
    if not len(above):
        return float(steps[-1])
    around = [above[0] - 1, above[0]]
    return float(np.interp(HALF_A_VALUE, excess[around], steps[around]))


# --- answers to claims ---


def _restricted_orders(task: str) -> Answer:
    """In log-odds, which no ceiling of the free order can bend; NaN where an order solves all or nothing."""
    rows = rows_of("sudoku-orders", task, kind="contrast", order="row-major")
    n = int(rows["n"].iloc[0])
    return answer_of(rows["log_odds"].to_numpy(), rows["log_odds_se"].to_numpy(), n, n)


def _free_order_in_reach(task: str) -> Gate:
    """Whether the free order solves some and not all, so that there is room for either to gain more."""
    rows = rows_of("sudoku-orders", task, kind="rate", order="confidence", n_loops=looped(task))
    rate = float(rows["solve_rate"].mean())
    return Gate(0.3 <= rate <= 0.7, f"by confidence {rate:.2f} of the puzzles are solved at S_max")


def _repair(task: str) -> Answer:
    rows, most = rows_of("sudoku-boards", task), looped(task)
    rows = rows[(rows["loop"] >= 1) & (rows["loop"] < most)]
    sums = rows.pivot_table(index="model", columns="metric", values="value", aggfunc="sum")
    values = (sums["repaired"] - sums["broken"]).to_numpy()
    return answer_of(values, np.full(len(values), np.nan), int(rows["n"].max()), 1)


def _belief(task: str) -> Answer:
    rows = rows_of("best-rounds", task, nominal_mask_ratio=0.5)
    values = [
        float(part["loop"].corr(part["best_round"].astype(float), method="spearman"))
        for _, part in rows.groupby("model")
    ]
    return answer_of(np.nan_to_num(np.array(values)), np.full(len(values), np.nan), int(rows["n"].iloc[0]), 1)


def _steps_a_loop(task: str) -> Answer:
    """Over fresh runs: the rise of the steps in reach from S = 1 to S_max, by loop added."""
    most, df = looped(task), rows_of("excess-kl", task)
    reached = steps_in_reach(df).pivot_table(index="model", columns="n_loops", values="steps")
    rise = settled_runs((reached[most] - reached[1]) / (most - 1), task, fresh=True)
    return over_runs(rise, int(df["n"].max()))


STEPS = (4, 7)
"""Steps of evaluation, from and to, that are out of reach at S = 1 and about in reach at S_max, as declared."""


def _missing(task: str, edges: str, n_loops: int) -> pd.Series:
    """Excess over hidden values of `STEPS`, nats a value, by fresh run."""
    df = rows_of("excess-kl-cut", task, edges=edges, n_loops=n_loops)
    df = df[df["hops"].between(*STEPS)]
    means = df.groupby("model").apply(lambda part: np.average(part["excess_kl"], weights=part["n_nodes"]))
    return settled_runs(means, task, fresh=True)


def _by_masked(task: str) -> Answer:
    cut = {edges: _missing(task, edges, looped(task)) for edges in ("masked->masked", "masked->clean")}
    n = int(rows_of("excess-kl-cut", task)["n"].max())
    return over_runs(cut["masked->masked"] - cut["masked->clean"], n)


def _loops_reach_on(task: str) -> Gate:
    gain = float((_missing(task, "none", 1) - _missing(task, "none", looped(task))).mean())
    told = f"looping gains {gain:.2f} nats a value at {STEPS[0]} to {STEPS[1]} steps"
    return Gate(gain > 0.5, told)


def _learned(task: str) -> Gate:
    """Whether looped models are nearer to the exact posterior than base: else they have learned no rounds."""
    df, found = tables.load("excess-kl"), {}
    df = df[df["task"] == task]
    for arm, n_loops in (("loop", looped(task)), ("base", 1)):
        rows = df[(df["arm"] == arm) & (df["n_loops"] == n_loops)]
        found[arm] = float(np.average(rows["excess_kl"], weights=rows["n_nodes"]))
    told = f"KL from the exact posterior, nats a node: loop at S_max {found['loop']:.4f}, base {found['base']:.4f}"
    return Gate(found["loop"] < found["base"], told)


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "sudoku-boards",
        "Loops repair far more cells than they break",
        ("sudoku-boards",),
        sudoku_boards,
        f"""6x6 Sudoku boards filled in one shot after every loop, to 3 x S_max: puzzles with one solution, 16 of
        36 cells hidden, 256 grids of unseen classes. (a) pairs of cells of one unit with the same symbol,
        hidden cells against clues and among themselves; hidden cells that differ from the solution; boards
        without a conflict with their clues that are invalid. (b) hidden cells that a loop repairs and that
        it breaks. {MEANS} The paper: early loops are locally plausible and globally inconsistent, later ones
        repair. Loops that break as much as they repair would count against it. Definitions are ours.""",
        (Reading("later-loops-repair", _repair, ("sudoku-boards",)),),
    ),
    Exhibit(
        "sudoku-orders",
        "Loops lift all stepwise orders; where most is not testable",
        ("sudoku-orders",),
        sudoku_orders,
        """Share of 6x6 puzzles completed validly at S = 1 and at S_max by order of generation. One cell a
        step by confidence, row by row, hardest first (least confident, or deepest for a propagation solver), and
        all cells at once; always the best symbol, 100 grids of unseen classes, any valid completion counts. A
        mark a training seed; bars: 95% over puzzles. The paper: looping matters where the order is restricted.
        A gain no larger there than by confidence counts against it. What the paper means by restricted is not
        public; these are ours.""",
        (Reading("restricted-orders-need-loops", _restricted_orders, ("sudoku-orders",), _free_order_in_reach),),
    ),
    Exhibit(
        "excess-kl",
        "Base is nearer the exact posterior: loops as rounds not testable",
        ("excess-kl", "belief-rounds"),
        excess_kl,
        """Read-outs against the exact posterior, on tasks where it is known. (a, c) KL of the read-out from it by
        S and by hops; (b, d) from rounds of belief propagation. (a, c) thousandths of a nat per hidden node, by S
        (first column: the base model, equal size and training FLOPs) and by the rounds of belief propagation
        that a node's posterior needs (hops; at most 12 shown); means over seeds, two masks a sequence (numbers:
        base, S = 1 and the best S). (b, d) KL from the belief after each synchronous round of belief propagation
        to the read-out after each loop, half masked; boxes: the rounds each loop is nearest to, within 1%, with
        the least KL. (a, b) a binary tree of 63 nodes with observed leaves; (c, d) a chain, whose posterior needs
        only the nearest observed nodes. If loop i did what round i does, boxes would run down a diagonal on the
        tree. Definitions are ours; the paper does not have these tasks.""",
        (
            Reading(
                "loop-is-a-round-of-belief-propagation",
                _belief,
                ("best-rounds", "excess-kl"),
                _learned,
            ),
        ),
    ),
    Exhibit(
        "arithmetic-steps",
        "A loop evaluates about one step further, past S_max too",
        ("excess-kl",),
        arithmetic_steps,
        """Trees of + - * modulo 7, written with the value of every operator, 12 operators each; a hidden value
        takes one step of evaluation where both its operands can be read, else one more than the deeper hidden
        one. (a) KL of the read-out from the exact answer, nats a hidden value, by steps (steps that fewer than
        20 hidden values take are left out), for base and deep (its looped layer untied, five layers) and the
        looped model after S loops, first seed; equal training FLOPs, 1,000 unseen expressions, two masks each.
        (b) steps in reach: where a line of (a) first crosses half of what a uniform guess lacks (0.97 nats;
        dotted in a), for every training seed; dots: one step a loop. Bands: 95% over expressions. Definitions
        are ours; the paper does not have this task. Lines of (a) that lie on each other, or a level line in (b),
        would say that loops do not carry the computation on.""",
        (Reading("one-step-a-loop", _steps_a_loop, ("excess-kl",), _learned),),
    ),
    Exhibit(
        "arithmetic-edges",
        "Cut from masked keys, later loops gain nothing; verdict undecided",
        ("excess-kl-cut",),
        arithmetic_edges,
        """What is missing of hidden values, by the steps of evaluation that they take, where later loops may not
        hear masked, or clean, positions. KL of the read-out from the exact answer, nats a value, at S = 1, at
        S_max = 4, and there with attention of masked queries to other masked keys, or to clean ones, cut in the
        looped layer from the second loop on (a query's own key is kept; prelude, first loop and coda are whole).
        1,000 unseen expressions, two masks each; steps that fewer than 20 hidden values take are left out.
        Bands: 95% over expressions. A panel a training seed; under either cut seed 1 goes astray. Operands of a
        deep value are hidden values themselves; the operators and leaves at their place are clean. The paper:
        looping works because masked positions interact; a line with masked keys cut that lies on that of S_max
        counts against it, one with clean keys cut that lies as high says that they are needed as much.""",
        (Reading("later-steps-come-by-masked", _by_masked, ("excess-kl-cut",), _loops_reach_on),),
    ),
)
