"""Figures of training: learning curves, arms at equal FLOPs, where and how much to loop."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.answers import (
    PLATEAU,
    Answer,
    Gate,
    NotRun,
    between_arms,
    by_rank,
    trend,
)
from loopmdm.analysis.exhibits.declared import deciding
from loopmdm.analysis.exhibits.registry import (
    ARMS,
    OTHER_TASKS,
    SEEDS,
    TITLES,
    Exhibit,
    Reading,
    Tables,
    compared,
    elsewhere,
    panels,
)
from loopmdm.analysis.measures.quality.efficiency import first_reach
from loopmdm.analysis.numbers import contrasts
from loopmdm.analysis.numbers.estimate import across_seeds
from loopmdm.analysis.plots import quality
from loopmdm.analysis.plots.style import AMOUNT_STYLE, PAGE, PAYS_STYLE, PLACE_STYLE


def _curves(df: pd.DataFrame) -> pd.DataFrame:
    """Each arm at its S_max, means over seeds; their FLOPs at a point differ by less than a step's cost."""
    own, by = df[df["n_loops"] == df["max_loops"]], ["task", "arm", "point"]
    own = own.assign(flops=across_seeds(own, "flops", by)["mean"])
    return across_seeds(own, "nelbo", by, "nelbo_se")


def learning_curves(loaded: Tables) -> MatplotlibFigure:
    """Validation NELBO against training FLOPs."""
    df = _curves(loaded["learning-curves"])
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    for ax, panel in zip(axes, panels(), strict=True):
        quality.plot_learning_curves(compared(df, panel.run.task), ax=ax)
        ax.set_title(panel.title)
        ax.legend(frameon=False)
    return drawn


def other_curves(loaded: Tables) -> MatplotlibFigure:
    """Learning curves of the tasks beside the two main ones."""
    return elsewhere(_curves(loaded["learning-curves"]), quality.plot_learning_curves, "validation NELBO")


def flops_to_target(loaded: Tables) -> MatplotlibFigure:
    """How many times fewer FLOPs an arm needs for what another one reaches; a row a task, a column a pair."""
    df = loaded["flops-to-target"]
    pairs = list(dict.fromkeys(zip(df["arm"], df["against"], strict=True)))
    drawn, axes = plt.subplots(
        2, len(pairs), figsize=(PAGE, 4.2), layout="constrained", sharey=True, sharex=True, squeeze=False
    )
    for row, panel in zip(axes, panels(), strict=True):
        for ax, (arm, against) in zip(row, pairs, strict=True):
            part = df[(df["task"] == panel.run.task) & (df["arm"] == arm) & (df["against"] == against)]
            quality.plot_flops_ratio(part, ax=ax)
            ax.set(title=f"{panel.title}: {arm} against {against}", ylabel="")
        row[0].set_ylabel("FLOPs of the second / first\n(above 1: the first needs fewer)")
    for ax in axes[0]:
        ax.set_xlabel("")
    return drawn


def arms(loaded: Tables) -> MatplotlibFigure:
    """Same size, deeper, looped: where each ends at equal training FLOPs, seed by seed."""
    nll, solve = loaded["nll-by-loops"], loaded["sudoku-solve-rate"]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.5), layout="constrained")
    for ax, panel in zip(axes, panels(), strict=False):
        part = _with_deciding(nll, panel.run.task)
        part = part[part["n_loops"] == part["max_loops"]]
        quality.plot_arms(across_seeds(part, "nll", ["arm"]), "nll", ax=ax)
        ax.set(title=panel.title, xlabel="arm (seeds)", ylabel="test NELBO (nats per token)")
    quality.plot_arms(_with_deciding(_as_trained(nll, solve), "sudoku"), "solve_rate", ax=axes[2])
    axes[2].set(title="Sudoku 6x6, one shot", xlabel="arm (seeds)", ylabel="puzzles solved (share)", ylim=(0, 1))
    return drawn


def _with_deciding(df: pd.DataFrame, task: str) -> pd.DataFrame:
    """Rows of the paper's arms on a task, and of the arm that decides between them where it is another one."""
    arms = {*ARMS, *(run.arm for run in deciding(task)["loop"])}
    return df[(df["task"] == task) & df["arm"].isin(arms)]


def _as_trained(nll: pd.DataFrame, solve: pd.DataFrame) -> pd.DataFrame:
    """Solve rates of 6x6 puzzles with 20 clues, each model at S_max of its own training; means over seeds."""
    part = solve[solve["task"] == "sudoku"]
    part = part[part["n_loops"] == part["model"].map(nll.groupby("model")["max_loops"].first())]
    return across_seeds(part, "solve_rate", ["arm"])


def placement(loaded: Tables) -> MatplotlibFigure:
    """Which of five layers loop: where each ends at equal training FLOPs, at S_max and at S = 1."""
    nll, solve = loaded["nll-by-loops"], loaded["sudoku-solve-rate"]
    nll = nll[nll["task"] == "sudoku"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.7), layout="constrained")
    once, ends = nll[(nll["n_loops"] == 1) & (nll["arm"] != "stack")], nll[nll["n_loops"] == nll["max_loops"]]
    quality.plot_arms(across_seeds(ends, "nll", ["arm"]), "nll", PLACE_STYLE, ax=axes[0])
    for place, arm in enumerate(arm for arm in PLACE_STYLE if arm in set(nll["arm"])):
        runs = once[once["arm"] == arm].merge(ends, on="model", suffixes=("_once", ""))
        across = quality.side_by_side(place, len(runs))
        axes[0].plot(across, runs["nll_once"], color="#444444", marker="x", linestyle="none", zorder=0)
        axes[0].vlines(across, runs["nll"], runs["nll_once"], color="#999999", linewidth=0.6, zorder=0)
    axes[0].set(title="at $S_{max}$ (crosses: at S = 1)", ylabel="test NELBO (nats per token)")
    quality.plot_arms(_as_trained(nll, solve), "solve_rate", PLACE_STYLE, ax=axes[1])
    axes[1].set(title="one shot, 16 of 36 cells hidden", ylabel="puzzles solved (share)", ylim=(0, 1))
    for ax in axes:
        ax.set_xlabel("layers of five that loop (seeds)")
    return drawn


def amount(loaded: Tables) -> MatplotlibFigure:
    """How far S goes in training: NELBO by S, and where each ends at its own S_max."""
    nll, solve = loaded["nll-by-loops"], loaded["sudoku-solve-rate"]
    nll = nll[nll["task"] == "sudoku"]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.7), layout="constrained", width_ratios=[1.4, 1, 1])
    nll = across_seeds(nll, "nll", ["arm", "n_loops"])
    quality.plot_amounts(nll, ax=axes[0])
    once = nll[nll["n_loops"] == 1].drop_duplicates("arm").set_index("arm")["mean"]
    others = once[once.index.isin(AMOUNT_STYLE) & (once.index != "loop-fixed")]
    axes[0].set_ylim(top=others.max() + 0.02)  # without loops the model of fixed S is far off
    axes[0].annotate(
        f"fixed: mean {once['loop-fixed']:.2f} at S = 1", (2, others.max()), fontsize=6.5, va="center"
    )
    axes[0].set_title("by S (rings: $S_{max}$ of training)")
    quality.plot_arms(nll[nll["n_loops"] == nll["max_loops"]], "nll", AMOUNT_STYLE, ax=axes[1])
    axes[1].set(title="at $S_{max}$", ylabel="test NELBO (nats per token)")
    quality.plot_arms(_as_trained(nll, solve), "solve_rate", AMOUNT_STYLE, ax=axes[2])
    axes[2].set(title="at $S_{max}$, one shot", ylabel="puzzles solved (share)", ylim=(0, 1))
    for ax in axes[1:]:
        ax.set_xlabel("$S_{max}$ of training (seeds)")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, [f"$S_{{max}}$ = {' '.join(label.split())}" for label in labels],
                 loc="outside lower center", ncols=6, frameon=False, columnspacing=1.2)  # fmt: skip
    return drawn


PAPER = (385, 3080)
"""Tokens a parameter of the paper's runs: LM1B (1 M steps of 512 x 128 for 170 M parameters), OpenWebText."""


def looping_pays(loaded: Tables) -> MatplotlibFigure:
    """Loop less base through training against tokens a parameter, at equal FLOPs and at equal tokens."""
    df = loaded["looping-gap"]
    s_max = df["arm"].map({"loop": "$S_{max}$ 6", "loop-s4": "$S_{max}$ 4"})
    named = {"sudoku": "Sudoku 6x6, " + s_max} | {
        task: pd.Series(title, df.index) for task, title in OTHER_TASKS.items()
    }
    named |= {"sotu": pd.Series(TITLES["sotu"], df.index)}
    df = df.assign(label=[named[task][row] for row, task in df["task"].items()])
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 3.4), layout="constrained", sharey=True)
    for ax, at in zip(axes, ("flops", "tokens"), strict=True):
        quality.plot_gap(df[df["at"] == at], PAYS_STYLE, ax=ax)
        ax.set_title(f"at equal training {'FLOPs' if at == 'flops' else at}")
        ax.axvspan(*PAPER, color="#eeeeee", zorder=0)
        ax.set_ylim(-0.36, 0.42)
        ax.annotate("the paper's\nregime: below 0\nat equal FLOPs", (np.sqrt(np.prod(PAPER)), 0.97), va="top",
                    xycoords=("data", "axes fraction"), ha="center", fontsize=6.3)  # fmt: skip
    axes[1].set_ylabel("")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return drawn


# --- answers to claims ---


def _deciding_curves(task: str, *roles: str) -> list[list[pd.DataFrame]]:
    """Learning curves at S_max of the runs that decide between arms, role by role; NotRun without any."""
    df = tables.load("learning-curves")
    df = df[df["n_loops"] == df["max_loops"]]
    runs = deciding(task)
    known = {str(name): part.sort_values("flops") for name, part in df.groupby("model")}
    found = [[known[run.name] for run in runs[role] if run.name in known] for role in roles]
    if not all(found):
        raise NotRun
    return found


def depth_has_room(task: str) -> Gate:
    """Whether the deeper twin is better at equal tokens, on validation: else more computation could not pay."""
    try:
        arms = _deciding_curves(task, "base", "deep")
    except NotRun:
        return Gate(False, "no deeper twin was trained, so whether depth pays is not known")
    if task in PLATEAU:
        arms = [[part for part in parts if part["nelbo"].iloc[-1] < PLATEAU[task]] for parts in arms]
    if len(arms[0]) < 2 or not arms[1]:
        return Gate(False, f"{len(arms[0])} base and {len(arms[1])} deep runs to compare at equal tokens: too few")
    tokens = min(float(part["tokens"].max()) for parts in arms for part in parts)
    base, deep = (np.array([_at_tokens(part, tokens) for part in parts]) for parts in arms)
    if len(deep) > 1:
        gap, error, _ = contrasts.contrast((deep, base))
    else:  # one run: as if it lay apart as the base runs do
        gap, error = float(deep[0] - base.mean()), float(base.std(ddof=1)) * (1 + 1 / len(base)) ** 0.5
    told = f"deep less base at {tokens / 1e6:.0f} M tokens {gap:.3f} (standard error {error:.3f})"
    return Gate(bool(gap + 2 * error < ROOM[task]), told)


def _at_tokens(curve: pd.DataFrame, tokens: float) -> float:
    return float(np.interp(np.log(tokens), np.log(curve["tokens"].astype(float)), curve["nelbo"]))


def _reach(curve: pd.DataFrame, target: float) -> float:
    """FLOPs at which a curve first reaches the target; inf if it never does."""
    flops = first_reach(curve["flops"].to_numpy(float), curve["nelbo"].to_numpy(float), target)
    return flops if np.isfinite(flops) else float("inf")


ROOM = {"sudoku": 0.0, "sotu": -0.03}
"""What the deeper twin's difference has to lie below by two standard errors, nats per token, as declared."""


def _fewer_flops(task: str) -> Answer:
    """By rank; runs that never got there count as if at the end of the budget, which favours the claim."""
    loop, base = _deciding_curves(task, "loop", "base")
    target = max(part["nelbo"].min() for part in base)
    ours, theirs = (np.array([_reach(part, target) for part in arm]) for arm in (loop, base))
    late, budget = int(np.isinf(ours).sum()), max(float(part["flops"].max()) for part in loop)
    estimate, low, high = np.exp(contrasts.shift(np.log(theirs), np.log(np.minimum(ours, budget))))
    told = (
        f"to {target:.3f} nats, the worst base run's best; first in {(ours[:, None] < theirs).mean():.0%} of pairs"
    )
    told += f"; {late} of {len(ours)} looped runs never got there, so this is an upper bound" if late else ""
    return Answer(
        float(estimate), float(low), float(high), len(ours), len(ours),
        lambda margin: contrasts.rank_p(np.log(ours), np.log(theirs) - np.log(margin)), told, len(theirs),
    )  # fmt: skip


SINGLE = ("loop-first", "loop-middle", "loop-late")
"""Placements of one looped layer beside the early-middle one."""


def _ends(task: str, *arms: str) -> list[pd.DataFrame]:
    """Test NELBO of arms at S_max of their own."""
    df = tables.load("nll-by-loops")
    df = df[(df["task"] == task) & (df["n_loops"] == df["max_loops"])]
    found = [df[df["arm"] == arm] for arm in arms]
    if any(part.empty for part in found):
        raise NotRun
    return found


def _placement(task: str) -> Answer:
    """Against all other places of one layer together, so that none is picked by the numbers that judge it."""
    early, *others = _ends(task, "loop-early", *SINGLE)
    return by_rank(early, pd.concat(others), "nll")


def _few_layers(task: str) -> Answer:
    return between_arms(*_ends(task, "loop-early", "loop-two"), "nll")


def _more_in_training(task: str) -> Answer:
    """Over all runs of the arms that differ in S_max alone."""
    df = pd.concat(_ends(task, "loop-s2", "loop-s4", "loop", "loop-s8", "loop-s12"))
    return trend(np.log2(df["max_loops"].to_numpy(float)), df["nll"].to_numpy(), int(df["n"].iloc[0]))


def _any_s(task: str) -> Answer:
    """At one loop: training with S = 6 at every step against S uniform on 1 to 6."""
    df = tables.load("nll-by-loops")
    df = df[(df["task"] == task) & (df["n_loops"] == 1)]
    fixed, uniform = (df[df["arm"] == arm] for arm in ("loop-fixed", "loop"))
    return by_rank(fixed, uniform, "nll")


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "learning-curves",
        "Sudoku: loop against base is undecided; on text base leads",
        ("learning-curves",),
        learning_curves,
        f"""Validation NELBO of EMA weights against training FLOPs (3 x forward, warm-up then constant rate),
        each arm at S_max of its training; loop and base at equal size, all at equal budgets. 128 validation
        sequences, two masks each. {SEEDS} The paper: the looped model reaches the base model's NLL with fewer
        FLOPs; a loop curve that stays above the base curve counts against it.""",
    ),
    Exhibit(
        "learning-curves-elsewhere",
        "Beside 6x6 Sudoku, loop ends below base on arithmetic alone",
        ("learning-curves",),
        other_curves,
        f"""Validation NELBO of EMA weights against training FLOPs on the other tasks: each arm at S_max of its
        training, equal budgets within a task, one learning rate for all arms of a task. {SEEDS} Where S widens
        from 1 in training, S_max is far from trained until it has. Axes differ between panels. The paper:
        looping pays on every corpus; a loop curve that stays above the base curve counts against it, except on
        the chain, where nothing is to be gained.""",
    ),
    Exhibit(
        "flops-to-target",
        "Training FLOPs saved: undecided on Sudoku, none seen on text",
        ("flops-to-target",),
        flops_to_target,
        """How many times fewer training FLOPs the first arm needs for the NELBO that the second one reaches
        after a quarter, half, three quarters and all of its budget. The NELBO is the mean over the second's
        seeds; at 100% what every one of its runs reaches. Bars: 95% over training seeds; no bar: one seed on a
        side, or seeds that never got there. On grey: not reached by all seeds of the first arm (how many did),
        or not by all of the second's own. Budgets are equal; at a small share all arms are on the same plateau.
        The paper: up to 3.3 times fewer FLOPs for loop against base at the end of the budget; a ratio below 1 at
        100% counts against it.""",
        tuple(
            Reading(claim, _fewer_flops, ("learning-curves",), depth_has_room)
            for claim in ("fewer-training-flops", "fewer-by-the-papers-factor")
        ),
    ),
    Exhibit(
        "when-looping-pays",
        "At equal FLOPs 6x6 Sudoku and arithmetic end below 0, text above",
        ("looping-gap",),
        looping_pays,
        """Validation NELBO of the looped model at S_max less that of base (same size, not looped) through
        training, from a quarter of the budget on, against training tokens by parameters of base, all sizes and
        tasks; below 0 looping pays. (a) at equal FLOPs, (b) at equal tokens. Means over seeds; bars at the end:
        95%, Welch over seeds, over validation sequences where there is one seed of an arm (as if each arm had
        read others, though both read the same: too wide). Shaded: the tokens a parameter of the paper's runs,
        whose gaps are not public. The axis leaves out gaps above 0.42, where S has just begun to widen, and
        arithmetic's below -0.36, where base has not left its plateau. The paper: looping pays at equal FLOPs;
        lines that do not fall below 0 as tokens grow count against it.""",
    ),
    Exhibit(
        "arms",
        "Loop solves more Sudokus than base; on text base leads",
        ("nll-by-loops", "sudoku-solve-rate"),
        arms,
        """The arms at the end of equal training FLOPs, a mark a training seed (their number in brackets), bars:
        means. Base: the looped model's size, not looped; deep: its looped layer untied, so larger, of about the
        looped model's mean compute a step at S_max 6, a third more than at 4; loop at S_max, 6 unless it says 4
        (seeds 3 to 9 of that arm and 5 to 9 of base and deep were declared beforehand). Test NELBO on 1,000
        grids of unseen classes and on all 1,957 blocks of 8 unseen speeches, one mask a sequence; one-shot with
        16 of 36 cells hidden on 500 grids. The paper: looped models beat same-size and deeper ones; a higher
        NELBO, or fewer solved, than base or deep counts against it.""",
    ),
    Exhibit(
        "placement",
        "No single layer stands out as the place to loop: undecided",
        ("nll-by-loops", "sudoku-solve-rate"),
        placement,
        """Which layers loop, on 6x6 Sudoku: five layers, of which none, one, two or all loop (the 5th alone and
        other pairs were not tried), at equal training FLOPs. S is uniform on 1 to 6, on 1 to 2 where all five
        loop, which is the mean compute of a step of one layer with S_max 6; two layers cost more a step, none
        less. A mark a training seed (their number in brackets), bars: means where there are several. (a) test
        NELBO at S_max, 1,000 grids of unseen classes, one mask each; crosses: the same model at S = 1, joined to
        its mark. (b) 500 grids, any valid completion counts. We take the 2nd layer as early-middle. The paper:
        few layers suffice and early-middle is the best place; another placement that ends lower counts against
        it. Most runs are still falling when the budget ends; of the 1st layer and of two layers, seeds lie as
        far apart as places.""",
        (
            Reading("placement", _placement, ("nll-by-loops",)),
            Reading("few-layers-suffice", _few_layers, ("nll-by-loops",)),
        ),
    ),
    Exhibit(
        "amount-of-looping",
        "From S_max 6 on, more looping in training ends higher",
        ("nll-by-loops", "sudoku-solve-rate"),
        amount,
        """How much to loop in training, on 6x6 Sudoku: one looped layer of three, S uniform on 1 to S_max, or 6
        at every step; equal training FLOPs, so that a larger S_max means fewer steps. (a) test NELBO by S to 3 x
        S_max, rings at S_max; lines: means over training seeds, thin ones single seeds; thin grey dashes: the
        non-looped model of the same size; the axis leaves out fixed S at S = 1, 2 and 18. (b, c) at S_max, a mark
        a training seed (their number in brackets), bars: means where there are several. 1,000 grids of unseen
        classes, one mask each; 500 grids in one shot with 16 of 36 cells hidden, any valid completion counts.
        The paper trains with S up to 12; a larger S_max that ends higher at equal FLOPs counts against more
        looping. Seeds lie far apart where some runs make the drop within the budget and others do not: a mean
        then mixes how often with how far.""",
        (
            Reading("larger-s-max-is-better", _more_in_training, ("nll-by-loops",)),
            Reading("any-s-from-uniform", _any_s, ("nll-by-loops",)),
        ),
    ),
)
