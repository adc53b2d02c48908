"""Figures of inference: quality by number of loops."""

from collections.abc import Callable, Sequence

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
    by_rank,
    ends,
    given_break,
    left_plateau,
    looped,
    nll,
    of_arm,
    rows_of,
    student,
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
from loopmdm.analysis.numbers.estimate import across_seeds, half_width, with_interval
from loopmdm.analysis.plots import quality
from loopmdm.analysis.plots.style import PAGE
from loopmdm.model.zoo.runs import Zoo


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


def word_problems(loaded: Tables) -> MatplotlibFigure:
    """Grade-school word problems: NELBO of worked answers by S, and accuracy."""
    nll, df = loaded["nll-by-loops"], loaded["word-problems"]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.7), layout="constrained")
    nll = across_seeds(compared(nll, "gsm"), "nll", BY_LOOPS, "nll_se")
    quality.plot_nll_by_loops(nll, ax=axes[0])
    axes[0].set(title="worked answers", ylabel="test NELBO (nats per token)")
    axes[0].legend(frameon=False)
    for ax, (problems, title) in zip(axes[1:], PROBLEM_PANELS, strict=True):
        part = df[df["problems"] == problems]
        quality.plot_accuracy(part, ax=ax)
        ax.set_title(title + (" (chance level)" if (part["low"] <= part["chance"] + POINTS).all() else ""))
    return drawn


POINTS = 0.02
"""What an interval has to lie above a guess to be more than chance level."""
PROBLEM_PANELS = (("gsm-symbolic", "unseen templates"), ("gsm8k-100", "GSM8K items"))


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


def zero_shot(loaded: Tables) -> MatplotlibFigure:
    """Seven corpora that the text models never saw."""
    df = loaded["zero-shot"]
    zoo = Zoo.shipped()
    base, loop = zoo.first("sotu", "base"), zoo.first("sotu")
    wanted = [(base, 1), *((loop, count) for count in (1, loop.s_max, 2 * loop.s_max))]
    parts = [
        df[(df["model"] == run.name) & (df["n_loops"] == count)].assign(label=f"{run.arm}, S = {count}")
        for run, count in wanted
    ]
    drawn, ax = plt.subplots(figsize=(PAGE * 0.7, 3.2), layout="constrained")
    shown = pd.concat(parts).rename(columns={"n_documents": "n_units"})
    quality.plot_zero_shot(with_interval(shown, "nelbo", "standard_error"), ax=ax)
    drawn.legend(loc="outside lower center", ncols=4, frameon=False)
    return drawn


def generative(loaded: Tables) -> MatplotlibFigure:
    """The judge's NLL of samples by loops and steps, beside what real text has."""
    df = loaded["generative"]
    samples = df[df["source"] == "samples"]
    real = df[df["source"] == "test text"].iloc[0]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.9), layout="constrained", width_ratios=[1.6, 1])
    base, loop = (Zoo.shipped().first("sotu", arm).name for arm in ("base", "loop"))
    quality.plot_generative(with_interval(samples[samples["model"] == loop], "judge_nll"), ax=axes[0])
    axes[0].set_title(f"{loop}'s samples; real text: {real['judge_nll']:.2f} nats")
    looks = {base: ("#8c8c8c", "s"), loop: ("#1b4f8f", "o")}
    for model, (colour, marker) in looks.items():
        part = samples[samples["model"] == model]
        axes[1].errorbar(part["unigram_entropy"], part["judge_nll"], xerr=half_width(part, "unigram_entropy_se"),
                         yerr=half_width(part, "judge_nll_se"), linestyle="none", marker=marker, color=colour,
                         linewidth=0.7, label=model)  # fmt: skip
    axes[1].plot(real["unigram_entropy"], real["judge_nll"], marker="*", color="black", linestyle="none",
                 markersize=7, label="real text")  # fmt: skip
    axes[1].legend(frameon=False, loc="center left")
    axes[1].set(xlabel="unigram entropy (nats)", ylabel="judge's NLL (nats)", title="beside unigram entropy")
    return drawn


def loops_or_steps(loaded: Tables) -> MatplotlibFigure:
    """Joint quality of samples, and marginal NELBO, against the FLOPs of a whole run."""
    df = loaded["loops-or-steps"]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.6), layout="constrained")
    boards, text = panels()
    shown = (
        (boards, "solve-rate", "Sudoku: whole boards", "puzzles solved"),
        (boards, "marginal-nll", "Sudoku: single cells", "NELBO (nats per token)"),
        (text, "marginal-nll", "text: single tokens", "NELBO (nats per token)"),
    )
    for ax, (panel, measure, title, label) in zip(axes, shown, strict=True):
        part = panel.of(df)
        quality.plot_loops_or_steps(with_interval(part[part["measure"] == measure], "quality"), ax=ax)
        ax.set(title=title, ylabel=label)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return drawn


# --- answers to claims ---


CURVES = ("nll-by-loops", "learning-curves")


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
    return Answer(estimate, low, high, min(map(len, left)), sum(map(len, left)), note=told)


def _one_loop(task: str) -> Answer:
    return by_rank(nll(task, "loop", 1), nll(task, "base", 1), "nll")


def _by_s(task: str) -> pd.DataFrame:
    """Test NELBO of the looped runs: a row a model, a column a loop count."""
    df = tables.load("nll-by-loops")
    df = df[(df["task"] == task) & (df["arm"] == "loop")]
    if df.empty:
        raise NotRun
    return df.pivot_table(index="model", columns="n_loops", values="nll")


def _of_runs(task: str, values: pd.Series, note: str = "") -> Answer:
    """Over looped runs; one run alone has no interval here."""
    df = nll(task, "loop", 1)
    return answer_of(values.to_numpy(), np.full(len(values), np.nan), int(df["n"].iloc[0]), 1, note)


def _more_loops(task: str) -> Answer:
    values = _by_s(task)
    return _of_runs(task, values[looped(task)] - values[1])


def _monotone(task: str) -> Answer:
    """The largest rise from one loop count that was read to the next, up to S_max."""
    values = _by_s(task)
    return _of_runs(task, values[[s for s in values if s <= looped(task)]].diff(axis=1).max(axis=1))


def _beyond(task: str) -> Answer:
    values, most = _by_s(task), looped(task)
    return _of_runs(task, values[2 * most] - values[most])


def _most_by_half(task: str) -> Answer:
    """In nats, so that a gain near 0 is divided by nothing."""
    values, most = _by_s(task), looped(task)
    return _of_runs(task, values[1] - values[most // 2] - 0.5 * (values[1] - values[most]))


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


def _samples(task: str, steps: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """The judge's NLL of samples at S_max less at S = 1 for each of `steps`, errors, and the samples a cell."""
    df = tables.load("generative")
    df = of_arm(df[df["source"] == "samples"], task, "loop", first=True).set_index(["n_loops", "steps"])
    if df.empty:
        raise NotRun
    ours, theirs = (df.sort_index().loc[s].loc[list(steps)] for s in (looped(task), 1))
    errors = np.hypot(ours["judge_nll_se"], theirs["judge_nll_se"])
    return (ours["judge_nll"] - theirs["judge_nll"]).to_numpy(), errors.to_numpy(), int(ours["n"].iloc[0])


def _generative(task: str) -> Answer:
    values, errors, n = _samples(task, (8, 16, 32, 64))
    return student(float(values.mean()), float((errors**2).sum() ** 0.5 / len(errors)), n, 1, n)


def _few_steps(task: str) -> Answer:
    values, errors, n = _samples(task, (8, 64))
    return student(float(values[0] - values[1]), float(np.hypot(*errors)), n, 1, n)


def _loops_for_steps(task: str) -> Answer:
    """At the least budget of FLOPs: S_max loops in few steps against one loop in many."""
    df = of_arm(tables.load("loops-or-steps"), task, "loop", first=True)
    df = df[(df["measure"] == "solve-rate") & (df["n_loops"] == looped(task))]
    if df.empty:
        raise NotRun
    row = df.sort_values("budget").iloc[0]
    difference, error = float(row["against_first"]), float(row["against_first_se"])
    return student(difference, error, int(row["n_units"]), 1, int(row["n"]))


def _above_chance(task: str) -> Gate:
    """Whether any arm answers more problems than always giving the commonest answer would."""
    df = tables.load("word-problems")
    df = df[(df["task"] == task) & (df["problems"] == "gsm-symbolic")]
    best = df.loc[df["low"].idxmax()]
    found = f"{best['accuracy']:.3f} ({best['low']:.3f} to {best['high']:.3f})"
    told = f"the best arm is right on a share of {found}, a guess on {best['chance']:.3f}"
    return Gate(bool(best["low"] > best["chance"] + POINTS), told)


def _not_in_them(task: str) -> Gate:  # noqa: ARG001 - a gate as others
    return Gate(
        False,
        "models of 0.6 M parameters, trained on 1.3 MB of speeches in windows of 64 tokens, hold none of the "
        "knowledge that the nine benchmarks ask for; at chance nothing can rise with loops",
    )


def _zero_shot(task: str) -> Answer:
    df, most = tables.load("zero-shot"), looped(task)
    loop = of_arm(df[df["n_loops"] == most], task, "loop", first=True).set_index("corpus")
    base = of_arm(df[df["n_loops"] == 1], task, "base", first=True).set_index("corpus")
    if loop.empty or base.empty:
        raise NotRun
    difference = loop["nelbo"] - base["nelbo"]
    worst = str(difference.idxmax())
    error = float(np.hypot(loop.loc[worst, "standard_error"], base.loc[worst, "standard_error"]))
    units = int(loop.loc[worst, "n_documents"])
    return answer_of(np.array([difference[worst]]), np.array([error]), int(loop.loc[worst, "n"]), units)


def _word_problems(task: str) -> Answer:
    df = tables.load("word-problems")
    df = df[(df["task"] == task) & (df["problems"] == "gsm-symbolic")]
    ours = df[(df["arm"] == "loop") & (df["n_loops"] == looped(task))]
    return between_arms(ours, df[(df["arm"] == "base") & (df["n_loops"] == 1)], "accuracy")


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "nll-by-loops",
        ("nll-by-loops", "references"),
        nll_by_loops,
        f"""Test NELBO by number of loops, to 3 x S_max (dash-dotted: S_max of training), base models to S_max:
        they were trained without looping at the same size and training FLOPs; their curve beyond S = 1 is
        looping without training for it and may leave the panel. Left: level. Right: paired change from S = 1.
        1,000 grids of unseen classes; all 1,957 test blocks of 8 unseen speeches; one mask a sequence. {SEEDS}
        The paper: more loops, lower NLL, also beyond S_max, and S = 1 worse than the base model.""",
        (
            Reading(
                "better-at-equal-flops", _better_than("base"), ("nll-by-loops", "learning-curves"), depth_has_room
            ),
            Reading(
                "better-than-deeper", _better_than("deep"), ("nll-by-loops", "learning-curves"), depth_has_room
            ),
            Reading("leaves-the-plateau", _leaves_the_plateau, CURVES),
            Reading("one-loop-is-worse", _one_loop, ("nll-by-loops",)),
            Reading("more-loops-are-better", _more_loops, ("nll-by-loops",)),
            Reading("monotone-in-loops", _monotone, ("nll-by-loops",)),
            Reading("needs-many-loops-to-beat-base", _loops_to_beat_base, ("nll-by-loops",), _some_beat_base),
            Reading("better-beyond-s-max", _beyond, ("nll-by-loops",)),
            Reading("most-by-half", _most_by_half, ("nll-by-loops",)),
        ),
    ),
    Exhibit(
        "nll-by-loops-elsewhere",
        ("nll-by-loops",),
        other_nll,
        f"""Test NELBO by number of loops on the other tasks, to 3 x S_max (dash-dotted: S_max of training), one
        mask a sequence; base models to S_max, untrained for it beyond S = 1, where their curve may leave the
        panel. 1,000 test grids, trees or chains each; all problems of unseen templates, which nobody learned
        (read to S_max only, base and deep at S = 1); all blocks of unseen documents. {SEEDS} Axes differ
        between panels; a band that fills one is wider than it. The paper: more loops, lower NLL, on every
        corpus; a loop curve that does not fall, or ends above base at S = 1, counts against it, except on the
        chain, where nothing is to be gained.""",
    ),
    Exhibit(
        "sudoku-solve-rate",
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
        "word-problems",
        ("nll-by-loops", "word-problems"),
        word_problems,
        """Grade-school word problems by S: models trained on generated GSM-Symbolic problems of 67 templates,
        tested on templates that training never saw (12, of which 10 are short enough), and on real GSM8K items
        without those that are a template's. Left: NELBO of the worked answer given its question; bands and
        bars: 95%, Student's t over templates. All arms learn the training templates by heart: on unseen ones
        their NELBO rises from a sixth of the budget on (learning-curves-elsewhere). Middle and right: the
        final number, generated most confident token first in 16 steps; bars: Wilson's 95% over problems (45
        and 50; templates taken as alike); dotted: always the commonest answer of training. base: same size and
        training FLOPs; deep: the looped layer untied. The paper: looping raises accuracy, above a deeper
        model's, too; accuracy that does not rise above base's counts against it. Chance level: no interval
        lies more than two points above the dotted line; such a panel says nothing about looping, only that
        these models do not do arithmetic. One seed.""",
        (Reading("reasoning", _word_problems, ("word-problems",), _above_chance),),
    ),
    Exhibit(
        "gain-by-noise",
        ("noise-level",),
        gain_by_noise,
        f"""Gain of looping over S = 1 (nats per masked token, paired by sequence and mask) by mask ratio, at
        several loop counts, looped models. 1,000 grids of unseen classes; all test blocks of 8 unseen
        speeches; one mask each. {MEANS} The band is that of S_max. The paper reports the largest gain at
        intermediate noise; a curve that peaks at an end counts against it.""",
        (Reading("intermediate-noise", _intermediate_noise, ("noise-level",)),),
    ),
    Exhibit(
        "zero-shot",
        ("zero-shot",),
        zero_shot,
        """NELBO on seven corpora that the text models never saw, at most 512 windows of 64 tokens each; bars:
        95% over documents. Stand-ins: quac-wiki for WikiText, headlines for AG News, xsum for LM1B, pubmed
        abstracts. Base and loop of equal size and training FLOPs, one seed. The paper: the looped model is
        better on all seven at S_max; one corpus on which base is ahead counts against it.""",
        (
            Reading("zero-shot", _zero_shot, ("zero-shot",)),
            Reading("downstream", None, (), _not_in_them),
        ),
    ),
    Exhibit(
        "generative",
        ("generative",),
        generative,
        """NLL of unconditional samples under SmolLM2-135M, by loops and denoising steps; 64 samples of 64 tokens
        each, 95% over samples; lines: equal FLOPs of the whole run. Right: the same beside the entropy of a
        sample's unigrams, which a judge alone would reward for falling; star: real test text. Samples of
        models of this size are far more surprising than real text. The paper: generative perplexity falls with
        S, most at few steps; a column that does not fall upwards counts against it (errors are of single
        cells; no correction for their number). One seed of training.""",
        (
            Reading("generative-perplexity-falls", _generative, ("generative",)),
            Reading("falls-most-at-few-steps", _few_steps, ("generative",)),
        ),
    ),
    Exhibit(
        "loops-or-steps",
        ("loops-or-steps",),
        loops_or_steps,
        """What a fixed amount of FLOPs buys, spent on loops or on denoising steps. Left: whole boards (16 of 36
        cells given, cells filled by confidence, any valid completion counts; 64 puzzles). Middle, right: the
        NELBO of single tokens, which steps cannot change: flat lines; loop counts are paired by mask, so that
        their differences are surer than the bars. Bars: 95% over puzzles, sequences or speeches. If more loops
        at equal FLOPs always solved more, steps would be the worse buy. The comparison is ours; one seed of
        training.""",
        (Reading("loops-for-steps", _loops_for_steps, ("loops-or-steps",)),),
    ),
)
