"""Figures beyond the models' own test sets: other corpora, samples, word problems, loops against steps."""

from collections.abc import Mapping
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.answers import (
    Answer,
    Gate,
    NotRun,
    answer_of,
    between_arms,
    by_t,
    looped,
    of_arm,
)
from loopmdm.analysis.exhibits.inference import BY_LOOPS
from loopmdm.analysis.exhibits.registry import (
    Exhibit,
    Reading,
    Tables,
    compared,
    panels,
)
from loopmdm.analysis.numbers.estimate import across_seeds, half_width, with_interval
from loopmdm.analysis.plots import quality
from loopmdm.analysis.plots.style import PAGE
from loopmdm.model.zoo.runs import Zoo


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
    axes[0].set_title(f"{loop}'s samples; orange: equal FLOPs")
    looks = {base: ("#8c8c8c", "s"), loop: ("#1b4f8f", "o")}
    for model, (colour, marker) in looks.items():
        part = samples[samples["model"] == model]
        axes[1].errorbar(part["unigram_entropy"], part["judge_nll"], xerr=half_width(part, "unigram_entropy_se"),
                         yerr=half_width(part, "judge_nll_se"), linestyle="none", marker=marker, color=colour,
                         linewidth=0.7, label=model)  # fmt: skip
    axes[1].plot(real["unigram_entropy"], real["judge_nll"], marker="*", color="black", linestyle="none",
                 markersize=7, label="real text")  # fmt: skip
    axes[1].legend(frameon=False, loc="center left")
    axes[1].set(
        xlabel="unigram entropy (nats)",
        ylabel="judge's NLL\n(nats per judge token)",
        title=f"real text: {real['judge_nll']:.2f} nats",
    )
    return drawn


def loops_or_steps(loaded: Tables) -> MatplotlibFigure:
    """Joint quality of samples, and marginal NELBO, against the FLOPs of a whole run."""
    df = loaded["loops-or-steps"]
    drawn, axes = plt.subplots(1, 3, figsize=(PAGE, 2.6), layout="constrained")
    boards, text = panels()
    shown = (
        (boards, "solve-rate", "Sudoku: whole boards", "puzzles solved (share)"),
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


def _samples(task: str, weights: Mapping[int, float]) -> Answer:
    """The judge's NLL of samples at S_max less at S = 1, summed over numbers of steps with `weights`."""
    df = of_arm(tables.load("generative"), task, "loop")
    df = df[(df["source"] == "samples") & df["steps"].isin(list(weights))]
    if df.empty:
        raise NotRun
    scale = df["steps"].map(weights) * df["n_loops"].map({looped(task): 1.0, 1: -1.0})
    n, by_run = int(df["n"].iloc[0]), df["model"]
    values = (scale * df["judge_nll"]).groupby(by_run).sum().to_numpy()
    errors = np.sqrt((scale * df["judge_nll_se"]).pow(2).groupby(by_run).sum().to_numpy())
    return answer_of(values, errors, n, n)


def _generative(task: str) -> Answer:
    return _samples(task, dict.fromkeys((8, 16, 32, 64), 0.25))


def _few_steps(task: str) -> Answer:
    return _samples(task, {8: 1.0, 64: -1.0})


def _loops_for_steps(task: str) -> Answer:
    """At the least budget of FLOPs: S_max loops in few steps against one loop in many."""
    df = of_arm(tables.load("loops-or-steps"), task, "loop", first=True)
    df = df[(df["measure"] == "solve-rate") & (df["n_loops"] == looped(task))]
    if df.empty:
        raise NotRun
    row = df.sort_values("budget").iloc[0]
    difference, error = float(row["against_first"]), float(row["against_first_se"])
    return by_t(difference, error, int(row["n_units"]) - 1, 1, int(row["n"]))


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
        "not asked: models of 1.05 M parameters, trained on speeches in windows of 64 tokens, hold none of the "
        "knowledge that the nine benchmarks ask for",
    )


def _zero_shot(task: str) -> Answer:
    df, most = tables.load("zero-shot"), looped(task)
    loop, base = of_arm(df[df["n_loops"] == most], task, "loop"), of_arm(df[df["n_loops"] == 1], task, "base")
    found = {
        str(corpus): between_arms(part, base[base["corpus"] == corpus], "nelbo")
        for corpus, part in loop.groupby("corpus")
    }
    if not found:
        raise NotRun
    worst = max(found, key=lambda corpus: found[corpus].estimate)
    better = sum(answer.high < 0 for answer in found.values())
    return replace(found[worst], note=f"worst on {worst}; better on {better} of {len(found)}")


def _word_problems(task: str) -> Answer:
    df = tables.load("word-problems")
    df = df[(df["task"] == task) & (df["problems"] == "gsm-symbolic")]
    ours = df[(df["arm"] == "loop") & (df["n_loops"] == looped(task))]
    return between_arms(ours, df[(df["arm"] == "base") & (df["n_loops"] == 1)], "accuracy")


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "word-problems",
        "At chance level: nothing here can tell whether looping helps",
        ("nll-by-loops", "word-problems"),
        word_problems,
        """Grade-school word problems by S: models trained on generated GSM-Symbolic problems of 67 templates,
        tested on templates that training never saw (12, of which 10 are short enough), and on real GSM8K items
        without those that are a template's. (a) NELBO of the worked answer given its question; bands and bars:
        95%, Student's t over templates. All arms learn the training templates by heart: on unseen ones their
        NELBO rises from a sixth of the budget on (learning-curves-elsewhere). (b, c) the final number, generated
        most confident token first in 16 steps; bars: Wilson's 95% over problems (45 and 50; templates taken as
        alike); dotted: always the commonest answer of training. base: same size and training FLOPs; deep: the
        looped layer untied. The paper: looping raises accuracy, above a deeper model's, too; accuracy that does
        not rise above base's counts against it. Chance level: no interval lies more than two points above the
        dotted line; such a panel says nothing about looping, only that these models do not do arithmetic. One
        seed.""",
        (Reading("reasoning", _word_problems, ("word-problems",), _above_chance),),
    ),
    Exhibit(
        "zero-shot",
        "Seed 0: at S_max loop leads on one of seven corpora",
        ("zero-shot",),
        zero_shot,
        """NELBO on seven corpora that the text models never saw, at most 512 windows of 64 tokens each; bars:
        95% over documents. Stand-ins: quac-wiki for WikiText, headlines for AG News, xsum for LM1B, pubmed
        abstracts. Base and loop of equal size and training FLOPs, seed 0; the verdict is over five seeds of
        each. The paper: the looped model is better on all seven at S_max; one corpus on which base is ahead
        counts against it.""",
        (
            Reading("zero-shot", _zero_shot, ("zero-shot",)),
            Reading("downstream", None, (), _not_in_them),
        ),
    ),
    Exhibit(
        "generative",
        "More loops do not make samples likelier to a judge",
        ("generative",),
        generative,
        """NLL of unconditional samples under SmolLM2-135M, by loops and denoising steps; 64 samples of 64 tokens
        each, 95% over samples; orange lines: equal FLOPs of the whole run. (b) the same beside the entropy of a
        sample's unigrams, which a judge alone would reward for falling; star: real test text. Samples of
        models of this size are far more surprising than real text. The paper: generative perplexity falls with
        S, most at few steps; a column that does not fall upwards counts against it (errors are of single
        cells; no correction for their number). Seed 0; the verdicts are over five seeds.""",
        (
            Reading("generative-perplexity-falls", _generative, ("generative",)),
            Reading("falls-most-at-few-steps", _few_steps, ("generative",)),
        ),
    ),
    Exhibit(
        "loops-or-steps",
        "At the smallest budget steps solve more boards than loops",
        ("loops-or-steps",),
        loops_or_steps,
        """What a fixed amount of FLOPs buys, spent on loops or on denoising steps. (a) whole boards (16 of 36
        cells given, cells filled by confidence, any valid completion counts; 64 puzzles). (b, c) the NELBO of
        single tokens, which steps cannot change: flat lines; loop counts are paired by mask, so that their
        differences are surer than the bars. Bars: 95% over puzzles, sequences or speeches. If more loops at
        equal FLOPs always solved more, steps would be the worse buy. The comparison is ours; one seed of
        training.""",
        (Reading("loops-for-steps", _loops_for_steps, ("loops-or-steps",)),),
    ),
)
