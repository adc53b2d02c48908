"""Figures of what a loop does: what cells still consider, what can be read off a state, what a push changes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits.answers import Answer, Gate, over_runs, rows_of, settled_runs
from loopmdm.analysis.exhibits.registry import HALF_MASKED, SOLVER, Exhibit, Reading, Tables, taken_apart
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.plots import candidates, dictionaries, edges, loops, probes
from loopmdm.analysis.plots.style import PAGE

NAKED = "naked singles"
FEW = 20
"""Boards below which a round of exclusion is not shown."""
ARMS = {"observed": ("#1b4f8f", "o"), "shuffled": ("#e08214", "^"), "untrained": ("#8c8c8c", "s")}


# --- what each cell considers ---


def pencil_marks(loaded: Tables) -> MatplotlibFigure:
    """One board after every loop, and what propagation has after as many rounds."""
    df = loaded["example-board"]
    drawn, ax = plt.subplots(figsize=(PAGE, 1.75), layout="constrained")
    candidates.plot_candidates(df, ax=ax)
    return drawn


def considered(loaded: Tables) -> MatplotlibFigure:
    """In which loop symbols are given up, by the round that excludes them; and how far loops are from rounds."""
    df = loaded["candidates"]
    own = df[(df["model"] == SOLVER) & (df["rule"] == NAKED) & (df["n"] >= FEW)]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.6), layout="constrained", width_ratios=[1.25, 1.1, 1])
    candidates.plot_deaths(own[own["arm"] == "observed"], ax=axes[0])
    candidates.plot_live(own[own["arm"] == "observed"], ax=axes[1])
    axes[1].get_legend().remove()
    axes[1].legend(
        frameon=False, title="excluded by", fontsize=6.2, title_fontsize=6.2, ncols=2, loc="upper right"
    )
    axes[1].set(ylim=(-0.02, 1.5), yticks=[0, 0.25, 0.5, 0.75, 1])
    _slopes(df, axes[2])
    for ax, title in zip(axes, ("given up in which loop", "still considered", "a loop a round?"), strict=True):
        ax.set_title(title)
    return drawn


def _slopes(df: pd.DataFrame, ax: plt.Axes) -> None:
    part = df[(df["metric"] == "slope") & (df["rule"] == NAKED)]
    names = list(dict.fromkeys(part["model"]))
    for arm, (colour, marker) in ARMS.items():
        rows = part[part["arm"] == arm].set_index("model").reindex(names)
        ax.errorbar(np.arange(len(names)), rows["value"], yerr=rows["high"] - rows["value"], color=colour,
                    marker=marker, linestyle="none", label=arm)  # fmt: skip
    ax.axhline(1, color="#444444", linewidth=0.6)
    ax.set_xticks(range(len(names)), [name.removeprefix("sudoku-") for name in names], rotation=40, ha="right")
    ax.set(xlabel="run", ylabel="slope (loops a round)", ylim=(None, 3.2))
    ax.legend(frameon=False, loc="upper left")


def scrubbing(loaded: Tables) -> MatplotlibFigure:
    """What is lost where hidden cells swap states with cells that may hold the same, loop by loop."""
    df = loaded["propagation-scrubbing"]
    df = with_interval(df[df["model"] == SOLVER], "kl")
    found = sorted(df["loop"].unique())
    drawn, axes = plt.subplots(1, len(found), figsize=(PAGE, 2.7), layout="constrained", sharey=True)
    for ax, loop in zip(np.atleast_1d(axes), found, strict=True):
        edges.plot_scrubbing(df[df["loop"] == loop], ax=ax)
        ax.set_title(f"after loop {loop}")
        ax.set_yscale("log")
        if loop != found[0]:
            ax.set_ylabel("")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


# --- what is there, and what a push does ---


def probed(loaded: Tables) -> MatplotlibFigure:
    """What linear probes read off states after every loop, beside an untrained twin."""
    df = loaded["probes"]
    df = df[(df["metric"] == "auc") & (df["labels"] == "true")]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    for ax, (title, model) in zip(axes, taken_apart().items(), strict=True):
        own = df[(df["model"] == model) & (df["round"].fillna(0) == 0)]
        probes.plot_probes(own, ax=ax)
        ax.set_title(title)
        ax.plot([], [], color="#444444", marker=".", linestyle="none", markersize=2.5, label="untrained twin")
        ax.legend(frameon=False, fontsize=6, ncols=3, loc="lower center")
    return drawn


def steered(loaded: Tables) -> MatplotlibFigure:
    """Whether a pushed cell follows, and whether its peers drop the symbol, by loop of the push."""
    df = loaded["steering"]
    df = df[(df["model"] == SOLVER) & (df["strength"] == 2)]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.6), layout="constrained")
    felt = "fall of p (share),\npeers less others"
    told = (("open", "follows", "open symbol: the cell follows", "boards (share)"),
            ("open", "felt", "open: peers drop it", felt),
            ("excluded", "felt", "excluded: peers drop it", felt))  # fmt: skip
    for ax, (kind, metric, title, label) in zip(axes, told, strict=True):
        probes.plot_steering(df[(df["kind"] == kind) & (df["metric"] == metric)], ax=ax)
        ax.set(title=title, ylabel=label)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


def learned_lenses(loaded: Tables) -> MatplotlibFigure:
    """How far each lens is from the final answer after every loop."""
    df = with_interval(loaded["lenses"], "value", "standard_error")
    df = df[df["weights"] == "trained"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.7), layout="constrained")
    for ax, (title, model) in zip(axes, taken_apart().items(), strict=True):
        loops.plot_lenses(df[df["model"] == model], ax=ax)
        ax.set_title(title)
    axes[0].legend(frameon=False)
    return drawn


def perturbation_gain(loaded: Tables) -> MatplotlibFigure:
    """How far a push at one hidden position travels, and how it grows, beside an untrained twin."""
    df = with_interval(loaded["perturbation-gain"], "value", "standard_error")
    for column, value in (("direction", "random"), ("size", 0), ("source", "masked"), ("receiver", "any")):
        df = df[df[column] == value]
    drawn, axes = plt.subplots(2, 3, figsize=(PAGE, 4.6), layout="constrained")
    for row, (title, model) in zip(axes, taken_apart().items(), strict=True):
        own = df[df["model"] == model]
        trained, bare = own[own["weights"] == "trained"], own[own["weights"] != "trained"]
        for ax, part, name in ((row[0], trained, title), (row[1], bare, "untrained twin")):
            loops.plot_gain(part[part["metric"] == "gain"], ax=ax)
            ax.set_title(name)
        low = min(ax.get_ylim()[0] for ax in row[:2])
        high = max(ax.get_ylim()[1] for ax in row[:2])
        for ax in row[:2]:
            ax.set_ylim(low, high)
        loops.plot_growth(trained[trained["metric"] == "growth"], ax=row[2])
        row[2].set_title("growth a loop")
        row[1].legend(frameon=False, fontsize=5.8, loc="lower right")
        row[2].legend(frameon=False)
    return drawn


def dictionary(loaded: Tables) -> MatplotlibFigure:
    """What sparse dictionaries for all loops keep, and when features live, by direction and by activity."""
    df = loaded["dictionaries"]
    df = df[df["arm"] == "trained"]
    drawn, axes = plt.subplots(2, 3, figsize=(PAGE, 4.4), layout="constrained")
    for row, (title, model) in zip(axes, taken_apart().items(), strict=True):
        own = df[df["model"] == model]
        dictionaries.plot_recovered(own, "kl_recovered", "kind", ax=row[0])
        row[0].set(title=f"{title}: kept", ylabel="KL recovered (share)", ylim=(0.8, 1.02))
        for ax, kind, told in (
            (row[1], "crosscoder", "crosscoder, by direction"),
            (row[2], "sae", "SAE, by activity"),
        ):
            dictionaries.plot_lives(own[own["kind"] == kind], ax=ax)
            ax.set(title=told, ylim=(0, 1.02))
    axes[0, 0].legend(frameon=False, loc="lower right")
    axes[0, 2].legend(frameon=False)
    return drawn


# --- answers to claims ---


def _slope(task: str) -> Answer:
    rows = rows_of("candidates", task, metric="slope", arm="observed", rule=NAKED)
    return over_runs(settled_runs(rows.set_index("model")["value"], task, fresh=True), int(rows["n"].min()))


def _places_alone(task: str) -> Gate:
    """Whether another board's candidates give neither a slope nor an AUC."""
    rows = rows_of("candidates", task, arm="shuffled", rule=NAKED)
    runs = settled_runs(rows[rows["metric"] == "slope"].set_index("model")["value"], task, fresh=True)
    auc = rows[(rows["metric"] == "auc") & rows["model"].isin(runs.index)]["value"].dropna()
    told = f"another board's candidates: slope {runs.max():.2f} at most, AUC {auc.min():.2f} to {auc.max():.2f}"
    return Gate(bool(runs.max() < 0.15 and auc.min() > 0.45 and auc.max() < 0.55), told)


# --- what is shown ---

BOARDS = "puzzles with one solution, 20 of 36 cells given, 256 grids of unseen classes"

EXHIBITS = (
    Exhibit(
        "pencil-marks",
        "One board settles loop by loop (illustration)",
        ("example-board",),
        pencil_marks,
        """What each cell of one 6x6 Sudoku still considers after every loop, and what naked singles leave after
        as many rounds (last panel). Numerals are as dark as they are probable; bold on grey: clues; large on
        blue: one symbol left (p above 1/12), and right; orange: wrong; framed: the best symbol changed. The
        board is chosen by rule: of the puzzles solved after the last loop and not after the first, the longest
        chain of deductions. Cells that are sure from the first loop on, or that settle in another order than
        deduction allows, would count against refinement. The picture is ours.""",
    ),
    Exhibit(
        "candidates",
        "Later rounds are excluded in later loops; claim not testable",
        ("candidates",),
        considered,
        f"""Does loop i exclude what round i of propagation excludes? (a) of the symbols that a round of naked
        singles excludes (round 0: by clues), the share that the read-out gives up for good in each loop;
        framed: a loop a round. (b) share of them still considered (p above 1/12). One run, S_max 4;
        {BOARDS}. (c) slope of the loop of giving up on the round of exclusion, by run, observed, against
        another board's candidates and in an untrained twin; bars: 95% over boards. A slope no steeper than
        that of a model without loops (0.33) would count against it. Definitions are ours.""",
        (Reading("loops-exclude-as-propagation", _slope, ("candidates", "learning-curves"), _places_alone),),
    ),
    Exhibit(
        "scrubbing",
        "Cells with the same candidates can nearly be swapped",
        ("propagation-scrubbing",),
        scrubbing,
        """Is the state after a loop, as far as the answer goes, the set of candidates after some round? All
        hidden cells of a board swap states with cells of other boards at the same place that have the same
        candidates after r rounds; KL of the answer from the intact one, against swaps within the same hidden
        symbol, with as many candidates, and with any hidden cell; 256 boards of 16 clues, one run; bars: 95%
        over boards. If cells with as many candidates served as well, or the best round did not rise with the
        loop, that would count against it. Causal scrubbing (Chan et al. 2022); the classes are ours.""",
    ),
    Exhibit(
        "probes",
        "Candidates are readable after loop 0; untrained twins know some",
        ("probes",),
        probed,
        f"""What linear probes read off the states of hidden positions: AUC on held-out sequences after the
        prelude (in) and every loop; dots: the same in an untrained twin. Sudoku: whether the cell's row, column
        or box holds a symbol among the clues, and whether the symbol is a candidate; text: classes of the hidden
        token by rule. Fitted on validation. {HALF_MASKED} An untrained twin as good, or no rise over loops,
        would count against it. Selectivity against control labels is in the table: cells can be told from
        states, so it is low on Sudoku. Targets are ours.""",
    ),
    Exhibit(
        "steering",
        "A pushed cell moves its peers; a random push hardly",
        ("steering",),
        steered,
        """Pushing the state of one hidden cell towards a symbol, two spreads long (43 to 69% of the state's
        norm), after the prelude or a loop. Share of boards in which the cell ends on the symbol, and how much
        more its peers lose p of the symbol than other cells. Open symbols (a, b) and ones that clues exclude
        (c); 64 boards of 14 clues, one run; bars: 95% over boards. A random push of equal length that does as
        much would count against it. Directions and measures are ours.""",
    ),
    Exhibit(
        "learned-lenses",
        "The coda reads best; a tuned lens pays on text only",
        ("lenses",),
        learned_lenses,
        f"""KL of the final answer from what each lens reads after every loop. Lenses: the coda's (the model at S
        = i), directly, a tuned lens (an affine map a loop, fitted on validation; Belrose et al. 2023), a
        Jacobian lens (what follows, linearised at its mean), and a tuned lens fitted to shuffled targets.
        {HALF_MASKED} A tuned lens no better than the shuffled one, or the coda not below the direct lens, would
        count against them. The lenses are known; one for every loop is ours.""",
    ),
    Exhibit(
        "perturbation-gain",
        "A push travels by relation or distance, and keeps growing",
        ("perturbation-gain",),
        perturbation_gain,
        f"""How far a change travels: derivative of other positions' states by a push at one hidden position, by
        relation or distance, loop by loop. The push is after the prelude; relations are on a board, distances on
        text; the twin is untrained. (c, f) growth of its whole norm, and of the pushed position's own, a loop.
        {HALF_MASKED} Peers and others alike, as in the twin, would count against communication along
        constraints; growth above 0 says that no loop contracts. Definitions are ours.""",
    ),
    Exhibit(
        "dictionaries",
        "A crosscoder's features all live throughout; some of an SAE's do not",
        ("dictionaries",),
        dictionary,
        """Sparse dictionaries (256 features, BatchTopK 16, 150 steps) for the states of all loops: a crosscoder,
        which has one code for all loops, and an SAE, which has one at each. (a, d) share of the KL to mean
        ablation that is recovered when a loop's state is replaced by its reconstruction; bars: one standard
        error over 64 test sequences. Live features by the first and last loop of their lives: (b, e) of the
        crosscoder where their decoder is above half of its largest, (c, f) of the SAE where they are active
        more than half as often as where they are most. On Sudoku a crosscoder rebuilds an untrained twin as well
        (table dictionaries), so fidelity alone says nothing there; features that all live from the first loop to
        the last, as a crosscoder's do, count against birth and death by loop, and an untrained twin's SAE that has
        as many births against reading a computation out of them. Lindsey et al. 2024; loops in place of layers
        are ours.""",
    ),
)
