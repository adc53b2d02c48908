"""Figures of what a loop does: what is read off, who tells whom, which head does what, what a push changes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits.answers import Answer, Gate, answer_of, left_plateau, rows_of
from loopmdm.analysis.exhibits.registry import TITLES, Exhibit, Reading, Tables
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.plots import candidates, cards, dictionaries, edges, loops, mechanism, probes
from loopmdm.analysis.plots.style import PAGE
from loopmdm.model.zoo.runs import Zoo

SOLVER = "sudoku-loop-s4"
"""The Sudoku model that is taken apart: of the S_max that leaves the plateau most often."""
NAKED = "naked singles"
FEW = 20
"""Boards below which a round of exclusion is not shown."""
ARMS = {"observed": ("#1b4f8f", "o"), "shuffled": ("#e08214", "^"), "untrained": ("#8c8c8c", "s")}


def _told(df: pd.DataFrame, value: str = "value", error: str = "standard_error") -> pd.DataFrame:
    return with_interval(df, value, error)


def _text() -> str:
    return Zoo.shipped().first("sotu").name


def _pair() -> dict[str, str]:
    """The models that stand side by side, by title."""
    return {f"{TITLES['sudoku']}, $S_{{max}}$ 4": SOLVER, TITLES["sotu"]: _text()}


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
    axes[1].legend(frameon=False, title="excluded by", fontsize=6.2, title_fontsize=6.2, loc="upper right")
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
    ax.set(ylabel="slope, loops a round", ylim=(None, 3.2))
    ax.legend(frameon=False, loc="upper left")


def scrubbing(loaded: Tables) -> MatplotlibFigure:
    """What is lost where hidden cells swap states with cells that may hold the same, loop by loop."""
    df = loaded["propagation-scrubbing"]
    df = _told(df[(df["model"] == SOLVER)], "kl", "kl_se")
    found = sorted(df["loop"].unique())
    drawn, axes = plt.subplots(1, len(found), figsize=(PAGE, 2.4), layout="constrained")
    for ax, loop in zip(np.atleast_1d(axes), found, strict=True):
        edges.plot_scrubbing(df[df["loop"] == loop], ax=ax)
        ax.set_title(f"after loop {loop + 1}")
        if loop != found[0]:
            ax.set_ylabel("")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


# --- who tells whom ---


def who_tells_whom(loaded: Tables) -> MatplotlibFigure:
    """What edges carry by relation, group and loop; and what two-hop paths carry by way of whom."""
    df, relays = (_told(loaded[name]) for name in ("edge-effects", "relay-effects"))
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 5.4), layout="constrained", width_ratios=[1.5, 1])
    for row, (title, model) in zip(axes, _pair().items(), strict=True):
        part = df[(df["model"] == model) & (df["method"] == "exact") & (df["metric"] == "kl")]
        edges.plot_edge_effects(part[part["queries"] == "masked"], ax=row[0])
        paths = relays[(relays["model"] == model) & (relays["metric"] == "kl") & (relays["relation"] != "any")]
        first = paths[(paths["loop"] == 0) & (paths["second"] == 1)]
        edges.plot_relays(first, ax=row[1])
        row[0].set_title(f"{title}: what masked queries are told")
        row[1].set_title("two hops, loop 1 then loop 2")
        row[1].legend(frameon=False)
    return drawn


def logit_attribution(loaded: Tables) -> MatplotlibFigure:
    """Which head and MLP of which loop writes the answer."""
    df = loaded["logit-attribution"]
    df = df[df["read"] == "direct"]
    drawn, axes = plt.subplots(2, 1, figsize=(PAGE, 5.0), layout="constrained")
    for ax, (title, model) in zip(axes, _pair().items(), strict=True):
        mechanism.plot_attribution(df[df["model"] == model], ax=ax)
        ax.set_title(title)
    axes[0].set_xlabel("")
    return drawn


def attribution_patching(loaded: Tables) -> MatplotlibFigure:
    """What a changed clean token does through which head and MLP of which loop: exact above, by gradient below."""
    df = loaded["attribution-patching"]
    df = df[(df["model"] == SOLVER) & (df["place"] == "all")]
    drawn, axes = plt.subplots(2, 1, figsize=(PAGE, 5.0), layout="constrained")
    for ax, value, title in zip(axes, ("exact", "value"), ("patched", "attributed by gradient"), strict=True):
        mechanism.plot_patching(df.dropna(subset=[value]), value=value, ax=ax)
        ax.set_title(f"{TITLES['sudoku']}, $S_{{max}}$ 4: {title}")
    axes[0].set_xlabel("")
    return drawn


def head_cards(loaded: Tables) -> MatplotlibFigure:
    """Where each looped head of the Sudoku model looks, and what it does for the symbols on clues."""
    df = _told(loaded["head-cards"])
    df = df[(df["model"] == SOLVER) & (df["weights"] == "trained")]
    heads = sorted(df["head"].dropna().unique())
    drawn, axes = plt.subplots(2, len(heads), figsize=(PAGE, 3.8), layout="constrained", sharey="row")
    for column, head in zip(axes.T, heads, strict=True):
        own = df[df["head"] == head]
        cards.plot_head_attention(own, ax=column[0])
        cards.plot_head_effects(own, ax=column[1])
        labels = ", ".join(dict.fromkeys(own.sort_values("loop")["label"]))
        column[0].set(title=f"head {head}: {labels}", xlabel="")
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    keys = [entry for row in axes for entry in zip(*row[0].get_legend_handles_labels(), strict=True)]
    for ax in axes.flat:
        ax.get_legend().remove()
    drawn.legend(*zip(*keys, strict=True), loc="outside lower center", ncols=len(keys), frameon=False,
                 columnspacing=1.0)  # fmt: skip
    return drawn


# --- what is there, and what a push does ---


def probed(loaded: Tables) -> MatplotlibFigure:
    """What linear probes read off states after every loop, beside an untrained twin."""
    df = loaded["probes"]
    df = df[(df["metric"] == "auc") & (df["labels"] == "true")]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    for ax, (title, model) in zip(axes, _pair().items(), strict=True):
        own = df[(df["model"] == model) & (df["round"].fillna(0) == 0)]
        probes.plot_probes(own, ax=ax)
        ax.set_title(title)
        ax.legend(frameon=False, fontsize=6, ncols=3, loc="lower center")
    return drawn


def steered(loaded: Tables) -> MatplotlibFigure:
    """Whether a pushed cell follows, and whether its peers drop the symbol, by loop of the push."""
    df = loaded["steering"]
    df = df[(df["model"] == SOLVER) & (df["strength"] == 2)]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.6), layout="constrained")
    told = (("open", "follows", "open symbol: the cell follows", "share of boards"),
            ("open", "felt", "open: peers drop it", "fall of p, peers less others"),
            ("excluded", "felt", "excluded symbol: peers drop it", "fall of p, peers less others"))  # fmt: skip
    for ax, (kind, metric, title, label) in zip(axes, told, strict=True):
        probes.plot_steering(df[(df["kind"] == kind) & (df["metric"] == metric)], ax=ax)
        ax.set(title=title, ylabel=label)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


def learned_lenses(loaded: Tables) -> MatplotlibFigure:
    """How far each lens is from the final answer after every loop."""
    df = _told(loaded["lenses"])
    df = df[df["weights"] == "trained"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.7), layout="constrained")
    for ax, (title, model) in zip(axes, _pair().items(), strict=True):
        loops.plot_lenses(df[df["model"] == model], ax=ax)
        ax.set_title(title)
    axes[0].legend(frameon=False)
    return drawn


def perturbation_gain(loaded: Tables) -> MatplotlibFigure:
    """How far a push at one hidden position travels, and how it grows, beside an untrained twin."""
    df = _told(loaded["perturbation-gain"])
    for column, value in (("direction", "random"), ("size", 0), ("source", "masked"), ("receiver", "any")):
        df = df[df[column] == value]
    drawn, axes = plt.subplots(2, 3, figsize=(PAGE, 4.6), layout="constrained")
    for row, (title, model) in zip(axes, _pair().items(), strict=True):
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
    """What one sparse dictionary for all loops keeps of the model, and when its features live."""
    df = loaded["dictionaries"]
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.4), layout="constrained")
    for row, (title, model) in zip(axes, _pair().items(), strict=True):
        own = df[df["model"] == model]
        dictionaries.plot_recovered(own[own["arm"] == "trained"], "kl_recovered", ax=row[0])
        dictionaries.plot_lives(own[own["arm"] == "trained"], ax=row[1])
        row[0].set(title=f"{title}: kept of the answer", ylabel="share of KL recovered", ylim=(0.8, 1.02))
        row[1].set_title("lives of features")
    axes[0, 1].legend(frameon=False)
    return drawn


# --- answers to claims ---


def _of_runs(values: pd.Series, task: str, fresh: bool) -> pd.Series:
    """By model: those that left the plateau, where the task has one; `fresh`: without the first seed."""
    if task == "sudoku":
        values = pd.Series(values[left_plateau(pd.Series(values.index, index=values.index), task)])
    first = Zoo.shipped().first(task).name
    return values.drop(index=first, errors="ignore") if fresh else values


def _answered(values: pd.Series, n: int) -> Answer:
    """Over seeds."""
    return answer_of(values.to_numpy(), np.full(len(values), np.nan), n, 1)


def _slope(task: str) -> Answer:
    rows = rows_of("candidates", task, metric="slope", arm="observed", rule=NAKED)
    return _answered(_of_runs(rows.set_index("model")["value"], task, fresh=True), int(rows["n"].min()))


def _places_alone(task: str) -> Gate:
    """Whether another board's candidates give neither a slope nor an AUC."""
    rows = rows_of("candidates", task, arm="shuffled", rule=NAKED)
    runs = _of_runs(rows[rows["metric"] == "slope"].set_index("model")["value"], task, fresh=True)
    auc = rows[(rows["metric"] == "auc") & rows["model"].isin(runs.index)]["value"].dropna()
    told = f"another board's candidates: slope {runs.max():.2f} at most, AUC {auc.min():.2f} to {auc.max():.2f}"
    return Gate(bool(runs.max() < 0.15 and auc.min() > 0.45 and auc.max() < 0.55), told)


def _by_relay(task: str) -> pd.DataFrame:
    rows = rows_of("relay-effects", task, metric="kl", relation="any")
    return rows.groupby(["model", "relay"])["value"].mean().unstack()


def _relays(task: str) -> Answer:
    found = _by_relay(task)
    values = _of_runs(found["masked"] - 10 * found["clean"], task, fresh=task != "sudoku")
    rows = rows_of("relay-effects", task, metric="kl", relation="any")
    return _answered(values, int(rows["n"].min()))


def _relays_carry(task: str) -> Gate:
    values = _of_runs(_by_relay(task)["masked"], task, fresh=task != "sudoku")
    mean, error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
    told = f"paths by masked relays carry {1e3 * mean:.2f} thousandths of a nat (SE {1e3 * error:.2f})"
    return Gate(mean > 2 * error, told)


def _taken(task: str) -> Answer:
    rows = rows_of("head-cards", task, metric="now", of="clean", weights="trained", loop=0)
    return _answered(_of_runs(rows.groupby("model")["value"].mean(), task, fresh=False), int(rows["n"].min()))


def _untrained_heads(task: str) -> Gate:
    rows = rows_of("head-cards", task, metric="now", of="clean")
    bare = rows[rows["weights"] != "trained"]
    share = float((bare["effect"] != "neither").mean())
    return Gate(share <= 0.05, f"{share:.0%} of untrained heads get a label")


def _changes(task: str) -> tuple[pd.DataFrame, int]:
    rows = rows_of("attribution-patching", task, place="all", segment="loop")
    rows = rows[rows["component"].isin(("attn_out", "mlp_out"))]
    late = rows.assign(late=rows["loop"] >= 1)
    return late.groupby(["model", "late"])["exact"].sum().unstack(), int(rows["n_exact"].min())


def _later(task: str) -> Answer:
    found, n = _changes(task)
    return _answered(_of_runs(found[True] - found[False], task, fresh=task != "sudoku"), n)


def _change_costs(task: str) -> Gate:
    rows = rows_of("attribution-patching", task, place="all")
    values = _of_runs(rows.groupby("model")["total"].first(), task, fresh=task != "sudoku")
    mean, error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
    told = f"the changed token costs {-mean:.2f} nats in all (SE {error:.2f})"
    return Gate(mean < -0.1 and mean + 2 * error < 0, told)


# --- what is shown ---

BOARDS = "puzzles with one solution, 20 of 36 cells given, 256 grids of unseen classes"
HALF = "Half of the positions masked; test sequences; bars and shades: 95% over sequences or documents."

EXHIBITS = (
    Exhibit(
        "pencil-marks",
        ("example-board",),
        pencil_marks,
        """What each cell of one 6x6 Sudoku still considers after every loop, and what naked singles leave after as
        many rounds (last panel). Numerals are as dark as they are probable; bold on grey: clues; large on blue:
        one symbol left (p above 1/12), and right; orange: wrong; framed: the best symbol changed. The board is
        chosen by rule: of the puzzles solved after the last loop and not after the first, the longest chain of
        deductions. Cells that are sure from the first loop on, or that settle in another order than deduction
        allows, would count against refinement. The picture is ours.""",
    ),
    Exhibit(
        "candidates",
        ("candidates",),
        considered,
        f"""Does loop i exclude what round i of propagation excludes? Left: of the symbols that a round of naked
        singles excludes (round 0: by clues), the share that the read-out gives up for good in each loop;
        framed: a loop a round. Middle: share of them still considered (p above 1/12). One run, S_max 4;
        {BOARDS}. Right: slope of the loop of giving up on the round of exclusion, by run, observed, against
        another board's candidates and in an untrained twin; bars: 95% over boards. A slope no steeper than that
        of a model without loops (0.33) would count against it. Definitions are ours.""",
        (Reading("loops-exclude-as-propagation", _slope, ("candidates", "learning-curves"), _places_alone),),
    ),
    Exhibit(
        "scrubbing",
        ("propagation-scrubbing",),
        scrubbing,
        """Is the state after a loop, as far as the answer goes, the set of candidates after some round? All hidden
        cells of a board swap states with cells of other boards at the same place that have the same candidates
        after r rounds; KL of the answer from the intact one, against swaps within the same hidden symbol, with
        as many candidates, and with any hidden cell; 256 boards of 16 clues, one run; bars: 95% over boards. If
        cells with as many candidates served as well, or the best round did not rise with the loop, that would
        count against it. Causal scrubbing (Chan et al. 2022); the classes are ours.""",
    ),
    Exhibit(
        "who-tells-whom",
        ("edge-effects", "relay-effects"),
        who_tells_whom,
        f"""What masked positions are told, in which loop: KL of the answer (thousandths of a nat) when, in one
        loop alone, the edges of a group carry keys and values of the same sequence with one clean token changed.
        Left: by relation (on a board; by distance on text) and by what the key holds (c clean, m masked),
        brackets where the 95% interval holds 0. Right: paths of two hops, changed token to relay to receiver,
        by the relation of the second hop and by what the relay holds. {HALF} Communication along constraints
        would be contradicted by edges without a common unit that carry as much, relays among hidden cells by
        clean relays that do. Definitions are ours.""",
        (Reading("relays-are-hidden", _relays, ("relay-effects", "learning-curves"), _relays_carry),),
    ),
    Exhibit(
        "logit-attribution",
        ("logit-attribution",),
        logit_attribution,
        f"""Share of the logit difference, true less best wrong token at masked positions, that each head and MLP
        of each loop writes: final norm frozen, so that the shares sum to the difference. {HALF} A map of another
        sign or order when writes are left out one by one (table logit-attribution, read "exact") would count
        against reading it as cause. The best wrong token is chosen for its luck: sums are biased downwards on
        text. The decomposition is standard; loops as its axis are ours.""",
    ),
    Exhibit(
        "attribution-patching",
        ("attribution-patching",),
        attribution_patching,
        """What a changed clue does to logit(true) - logit(a random wrong symbol) through each head and MLP of each
        loop. Above: the corrupted run's activation is patched in (32 boards), below: first-order attribution
        (64 boards, two forwards and one backward for all). Half of the cells hidden; one run, S_max 4. Maps
        that differ in sign or order show where the gradient misleads: in the prelude it does, as a changed
        token is no small step. Effects of loop 1 as large as those of later loops would count against a
        refinement over loops. The method is Nanda 2023 and Kramar et al. 2024; loops as nodes are ours.""",
        (
            Reading(
                "later-loops-carry-a-change", _later, ("attribution-patching", "learning-curves"), _change_costs
            ),
        ),
    ),
    Exhibit(
        "head-cards",
        ("head-cards",),
        head_cards,
        """What each looped head of one Sudoku model does, loop by loop. Above: where hidden cells look, by
        relation; the label is by rule. Below: logit of the symbols that clues hold less the others, at full
        attention through W_O and the unembedding alone (direct), to first order through all that follows
        (gradient), read out right after the loop (now), and at the end when the head's write is removed
        (removed; all at the query). Below 0 the head says "taken". 128 boards, half hidden, 48 for what heads
        do; bars: 95% over boards. Untrained heads that get labels, or reads of opposite sign, would count
        against it. Definitions are ours.""",
        (Reading("heads-say-what-is-taken", _taken, ("head-cards", "learning-curves"), _untrained_heads),),
    ),
    Exhibit(
        "probes",
        ("probes",),
        probed,
        f"""What linear probes read off the states of hidden positions: AUC on held-out sequences after the prelude
        (0) and every loop; dots: the same in an untrained twin. Sudoku: whether the cell's row, column or box
        holds a symbol among the clues, and whether the symbol is a candidate; text: classes of the hidden token
        by rule. Fitted on validation. {HALF} An untrained twin as good, or no rise over loops, would count
        against it. Selectivity against control labels is in the table: cells can be told from states, so it is
        low on Sudoku. Targets are ours.""",
    ),
    Exhibit(
        "steering",
        ("steering",),
        steered,
        """Pushing the state of one hidden cell towards a symbol, two spreads long (43 to 69% of the state's norm),
        after the prelude or a loop: share of boards in which the cell ends on the symbol, and how much more its
        peers lose p of the symbol than other cells. Open symbols (left, middle) and ones that clues exclude
        (right); 64 boards of 14 clues, one run; bars: 95% over boards. A random push of equal length that does
        as much would count against it. Directions and measures are ours.""",
    ),
    Exhibit(
        "learned-lenses",
        ("lenses",),
        learned_lenses,
        f"""KL of the final answer from what each lens reads after every loop: the coda's (the model at S = i),
        directly, a tuned lens (an affine map a loop, fitted on validation; Belrose et al. 2023), a Jacobian
        lens (what follows, linearised at its mean), and a tuned lens fitted to shuffled targets. {HALF} A tuned
        lens no better than the shuffled one, or the coda not below the direct lens, would count against them.
        The lenses are known; one for every loop is ours.""",
    ),
    Exhibit(
        "perturbation-gain",
        ("perturbation-gain",),
        perturbation_gain,
        f"""How far a change travels: derivative of other positions' states by a push at one hidden position after
        the prelude, by relation (on a board) or distance, loop by loop, in the trained model and an untrained
        twin; right: growth of its whole norm, and of the pushed position's own, a loop. {HALF} Peers and others
        alike, as in the twin, would count against communication along constraints; growth above 0 says that no
        loop contracts. Definitions are ours.""",
    ),
    Exhibit(
        "dictionaries",
        ("dictionaries",),
        dictionary,
        """One sparse dictionary (a crosscoder of 256 features, BatchTopK 16, 150 steps) for the states of all
        loops. Left: share of the KL to mean ablation that is recovered when a loop's state is replaced by its
        reconstruction; bars: one standard error over 96 test sequences. Right: live features by the first and
        last loop in which their decoder is above half of its largest. An untrained twin is rebuilt as well
        (table dictionaries), so fidelity alone says nothing; features all alive in all loops count against
        birth and death by loop. Lindsey et al. 2024; loops in place of layers are ours.""",
    ),
)
