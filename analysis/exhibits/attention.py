"""Figures of attention between groups, and of maps side by side."""

from collections.abc import Callable
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.answers import Answer, answer_of, looped, rows_of, trend
from loopmdm.analysis.exhibits.declared import deciding, is_confirmed
from loopmdm.analysis.exhibits.registry import GRIDS, ONE, OURS, TEXT, Exhibit, Reading, Tables, of_models, panels
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.numbers.reading import by_loop
from loopmdm.analysis.plots import attention
from loopmdm.analysis.plots.style import PAGE, mark_trained
from loopmdm.model.zoo.runs import Zoo


def _looped(df: pd.DataFrame, model: str, longest: bool = True) -> pd.DataFrame:
    """Masked queries, heads pooled, of the looped layer, read to 3 x S_max (or to S_max)."""
    part = df[(df["model"] == model) & (df["query_group"] == "masked") & df["head"].isna()]
    n_loops = part["n_loops"].max() if longest else part["n_loops"].min()
    return part[part["n_loops"] == n_loops]


def mask_to_mask(loaded: Tables) -> MatplotlibFigure:
    """Mass at half masked, log-odds at three ratios, and the layers outside the loop."""
    df = loaded["mask-attention"]
    drawn, axes = plt.subplots(2, 3, figsize=(PAGE, 4.6), layout="constrained", width_ratios=[1, 1, 0.9])
    for row, panel in zip(axes, panels(), strict=True):
        row[2].sharey(row[1])
        part = _looped(df, panel.model)
        loop = part[part["segment"] == "loop"]
        half = loop[np.isclose(loop["nominal_mask_ratio"], 0.5)]
        attention.plot_mass_by_loop(with_interval(half, "mass"), ax=row[0])
        row[0].set_title(f"{panel.title}: mass, 50% masked")
        log_odds = loop[loop["key_group"] == "masked"]
        attention.plot_log_odds_by_loop(with_interval(log_odds, "log_odds"), ax=row[1])
        others = [_looped(df, name) for name in panel.seeds if name != panel.model]
        attention.plot_other_seeds([one[(one["segment"] == "loop") & (one["key_group"] == "masked")]
                                    for one in others], ax=row[1])  # fmt: skip
        row[1].set_title(f"{panel.title}: log-odds")
        for ax in row[:2]:
            mark_trained(ax, panel.run.s_max, len(half["loop"].unique()))
        rest = _looped(df, panel.model, longest=False)
        rest = rest[(rest["segment"] != "loop") & (rest["key_group"] == "masked")]
        attention.plot_log_odds_by_layer(with_interval(rest, "log_odds"), ax=row[2])
        row[2].set(title=f"outside the loop (S = {panel.run.s_max})", xlabel="layer")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[0, 1].get_legend_handles_labels()[0]]
    drawn.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, columnspacing=1.2)
    return drawn


def attention_maps(loaded: Tables) -> MatplotlibFigure:
    """The head that changes most, side by side across loops, with the difference."""
    df = loaded["attention-maps"]
    loops = sorted(df["loop"].unique())
    stacks = {
        head: np.stack([_matrix(part[part["loop"] == loop]) for loop in loops])
        for head, part in df.groupby("head")
    }
    head = max(stacks, key=lambda key: np.abs(stacks[key][-1] - stacks[key][0]).mean())
    rows = df[(df["head"] == head) & (df["loop"] == loops[0])].drop_duplicates("query").sort_values("query")
    masked = rows["query_masked"].to_numpy()
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 6.9), layout="constrained")
    images = attention.draw_maps(list(axes.flat), stacks[head], loops, _pieces(list(rows["query_true"])), masked)
    attention.name_bars(axes, images)
    for ax in axes[0]:
        ax.set(xlabel="", xticklabels=[])
    for ax in axes[:, 1]:
        ax.set(ylabel="", yticklabels=[])
    drawn.supxlabel(
        f"{df['model'].iloc[0]}, layer {rows['layer'].iloc[0]}, head {head}. Word pieces: blue and bold masked "
        "(the true piece), orange clean; -: goes on a word; ␣: line break",
        fontsize=7,
    )
    return drawn


def _pieces(tokens: list[str]) -> list[str]:
    """Word pieces as labels: those that go on a word begin with a hyphen."""
    found = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        inside = token[:1].isalpha() and before[-1:].isalpha()
        found.append(f"-{token}" if inside else token.strip() or "␣")
    return found


def _matrix(part: pd.DataFrame) -> np.ndarray:
    return part.pivot(index="query", columns="key", values="attention").to_numpy()


def saturation(loaded: Tables) -> MatplotlibFigure:
    """Where the rise of masked-to-masked attention ends, by S_max of training."""
    df = of_models(loaded["mask-attention-by-s-max"])
    df = df[(df["segment"] == "loop") & (df["query_group"] == "masked") & (df["key_group"] == "masked")]
    zoo = Zoo.shipped()
    df = df.assign(s_max=df["model"].map({name: zoo[name].s_max for name in df["model"].unique()}))
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.9), layout="constrained")
    attention.plot_by_s_max(with_interval(df, "log_odds"), axes=axes)
    axes[0].set_title("6x6 Sudoku: log-odds (rings: $S_{max}$)")
    axes[1].set_title("rise since the first loop")
    axes[0].legend(title="$S_{max}$ of training", title_fontsize=6.8, frameon=False, ncols=2)
    return drawn


def content(loaded: Tables) -> MatplotlibFigure:
    """What is moved between masked positions, by loop, and the log-odds along the model's own sampling."""
    df, sampled = loaded["mask-attention"], loaded["attention-along-sampling"]
    sampled = sampled[(sampled["query_group"] == "masked") & (sampled["key_group"] == "masked")]
    sampled = sampled[sampled["segment"] == "loop"]
    most = float(sampled["log_odds"].abs().max())
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.4), layout="constrained")
    for row, panel in zip(axes, panels(), strict=True):
        part = _looped(df, panel.model)
        part = part[(part["segment"] == "loop") & (part["key_group"] == "masked")]
        attention.plot_content_by_loop(with_interval(part, "content"), ax=row[0])
        mark_trained(row[0], panel.run.s_max, part["loop"].nunique())
        row[0].set_title(f"{panel.title}: content, masked → masked")
        own = panel.of(sampled)
        own = own.assign(mask_ratio=own.groupby("step")["mask_ratio"].transform("mean"))
        attention.plot_by_step(own, most=most, ax=row[1])
        row[1].set_title(f"{panel.title}: along its own samples")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False)
    return drawn


MEASURES = {
    "log_odds": "log-odds\n(nats)",
    "lift": "lift\n(log ratio)",
    "mass": "mass\n(share)",
    "toggle": "toggled key\n(share)",
    "content": "content\n(norm)",
}


def specifications(loaded: Tables) -> MatplotlibFigure:
    """The same claim under every definition: a row a measure, in its own unit."""
    df = loaded["attention-specifications"].dropna(subset=["estimate"])
    df = df.drop_duplicates(["model", "measure", "nominal_mask_ratio", "estimate", "standard_error"])
    drawn, axes = plt.subplots(len(MEASURES), 2, figsize=(PAGE, 6.6), layout="constrained", sharex=True)
    for column, panel in zip(axes.T, panels(), strict=True):
        for ax, (measure, label) in zip(column, MEASURES.items(), strict=True):
            part = panel.of(df[df["measure"] == measure])
            attention.plot_specifications(part, ax=ax)
            ax.set(xlabel="", ylabel=f"rise of {label}")
        own = panel.of(df)
        counts = [f"{(own['verdict'] == word).sum()} {word}" for word in ("rises", "undecided", "falls")]
        column[0].set_title(
            f"{panel.title}: {', '.join(counts).replace('rises', 'rise').replace('falls', 'fall')}"
        )
        column[-1].set_xlabel("how heads are pooled")
    drawn.legend(handles=attention.specification_handles(), loc="outside lower center", ncols=5, frameon=False)
    return drawn


def heads(loaded: Tables) -> MatplotlibFigure:
    """Heads that change most, ranked on one half and tested on the other."""
    df = loaded["attention-heads"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE * 0.8, 2.6), layout="constrained", sharey=True)
    for ax, panel in zip(axes, panels(), strict=True):
        attention.plot_heads(with_interval(panel.of(df), "growth", "standard_error"), ax=ax)
        ax.set_title(panel.title)
    axes[1].set_ylabel("")
    axes[0].legend(frameon=False)
    return drawn


# --- answers to claims ---


RISES = ("mask-attention", "mask-attention-by-s-max")


def _masked_to_masked(task: str, claim: str = "") -> tuple[pd.DataFrame, int]:
    """Looped layer, half masked, heads pooled, to 3 S_max; and S_max. Of a declared set, if it is whole."""
    if is_confirmed(task, claim):
        df, runs = tables.load("mask-attention-by-s-max"), deciding(task)["loop"]
        df, most = df[df["model"].isin([run.name for run in runs])], runs[0].s_max
    else:
        df, most = rows_of("mask-attention", task, nominal_mask_ratio=0.5), looped(task)
        df = df[df["head"].isna() & (df["n_loops"] == df["n_loops"].max())]
    return df[(df["segment"] == "loop") & (df["query_group"] == "masked") & (df["key_group"] == "masked")], most


def _rise(claim: str, column: str, relative: bool = False) -> Callable[[str], Answer]:
    """From the first to the last loop of S_max."""

    def answer(task: str) -> Answer:
        df, most = _masked_to_masked(task, claim)
        values, errors = (by_loop(df, name, "model") for name in (column, f"{column}_se"))
        error = np.hypot(errors[0], errors[most - 1])  # as if independent, on the safe side: they are paired
        scale = values[0] if relative else 1.0
        rise = (values[most - 1] - values[0]) / scale
        return answer_of(rise.to_numpy(), (error / scale).to_numpy(), int(df["n"].max()), int(df["n_units"].max()))

    return answer


MOST = 0.9
"""The share of a rise at which it counts as done."""


def _done_at(values: pd.DataFrame, most: int) -> pd.Series:
    """The loop, counted from 1, at which most of the rise from the first loop to S_max is there; NaN: no rise."""
    rise = values[most - 1] - values[0]
    there = values[list(range(most))].sub(values[0], axis=0).ge(MOST * rise, axis=0).to_numpy()
    return pd.Series(there.argmax(axis=1) + 1.0, values.index).where(rise > 0)


def _saturates(task: str) -> Answer:
    df, most = _masked_to_masked(task)
    share = (_done_at(by_loop(df, "log_odds", "model"), most) / most).to_numpy(dtype=float)
    return answer_of(share, np.full(len(share), np.nan), len(share), 1)


def _follows_s_max(task: str) -> Answer:
    """Over models that differ in S_max of training."""
    df = of_models(tables.load("mask-attention-by-s-max"))
    df = df[(df["task"] == task) & (df["segment"] == "loop")]
    df = df[(df["query_group"] == "masked") & (df["key_group"] == "masked")]
    zoo, found = Zoo.shipped(), []
    for name, part in df.groupby("model"):
        most = zoo[str(name)].s_max
        found.append((most, float(_done_at(by_loop(part, "log_odds", "model"), most).iloc[0])))
    s_max, done = np.array([row for row in found if np.isfinite(row[1])]).T
    rise = ", ".join(f"{value:g}" for value in sorted(set(s_max)))
    told = f"{len(s_max)} of {len(found)} models rise, with S_max {rise}"
    return replace(trend(s_max, done, int(df["n"].max())), note=told)


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "mask-to-mask-by-loop",
        "Log-odds of masked keys rise on text; Sudoku is undecided",
        ("mask-attention",),
        mask_to_mask,
        f"""Attention of masked queries in the looped layer, by loop, to 3 x S_max. (a, d) mean mass on other
        masked keys, on clean keys and on itself, heads averaged; dotted: chance, the mean share of such keys.
        (b, e) log-odds of a masked against a clean key, self excluded; 0 = the head does not care; thin:
        other training seeds, half masked. (c, f) the same in the layers outside the loop. {GRIDS}; {TEXT}.
        Loop i is the same for every n_loops > i, so there is one curve. The paper reports that mask-to-mask
        attention rises with the loop count and saturates near S_max; a flat or falling curve counts against
        it. {OURS} {ONE}""",
        (
            Reading("mask-to-mask-rises", _rise("mask-to-mask-rises", "log_odds"), RISES),
            Reading("mask-to-mask-saturates", _saturates, ("mask-attention",)),
        ),
    ),
    Exhibit(
        "saturation",
        "Where the rise ends does not follow S_max of training",
        ("mask-attention-by-s-max",),
        saturation,
        f"""Where the rise of masked-to-masked attention ends, by the largest loop count of training. Log-odds of
        a masked against a clean key for masked queries in the looped layer, half masked, heads pooled, each
        model read to 3 x its S_max. (a) by loop; bands: 95% (seed 0). (b) the rise since the first loop, against
        loops run / S_max. {GRIDS}. The paper: the rise saturates near S_max of training. Curves that turn at one
        and the same loop whatever S_max was, that fall before S_max, or that go on rising beyond 1 in b count
        against it; so does one that does not rise. {OURS} One seed of training a line; of S_max = 6 four more,
        of 4 seven (thin).""",
        (Reading("saturation-follows-s-max", _follows_s_max, ("mask-attention-by-s-max",)),),
    ),
    Exhibit(
        "attention-maps",
        "One head: the next position first, others later (illustration)",
        ("attention-maps",),
        attention_maps,
        f"""Attention of one head of sotu-loop at three loops, and last minus first. The first 32 tokens of one
        test block, drawn by seed before looking; half of them masked (blue and bold, with the true piece; clean:
        orange). Shades are square roots, so that small weights are seen. The head is the one that changes most:
        an illustration, n = 1, not a test. The map at loop i is the map a run with n_loops = i + 1 ends on.
        {OURS} {ONE}""",
    ),
    Exhibit(
        "attention-content",
        "Half masked, content grows on Sudoku; on text undecided",
        ("mask-attention", "attention-along-sampling"),
        content,
        f"""What masked positions pass on, and where they look while sampling. (a, c) norm of what masked keys
        move into masked queries in the looped layer (attention times the value through the output matrix, less
        what all masked keys have in common), by loop, at three mask ratios, to 3 x S_max; bands: 95%. (b, d)
        log-odds of a masked against a clean key before some denoising steps of the model's own samples, 64 of
        them; in the first step nothing is clean. {GRIDS}; {TEXT}. Log-odds that rise while content does not
        would say that masked positions look at each other more and tell each other no more. {OURS} {ONE}""",
        (Reading("content-rises", _rise("content-rises", "content", relative=True), RISES),),
    ),
    Exhibit(
        "specification-curve",
        "Most definitions rise, some fall, on both tasks",
        ("attention-specifications",),
        specifications,
        f"""Does masked-to-masked attention rise from the first loop to S_max? Every reasonable definition: mass,
        lift, log-odds, content, toggled key; with and without self and sinks; heads averaged, weighted by
        content, or the one that grows most; three mask ratios. Definitions that come to the same number are
        shown once. A row a measure, in its own unit, with 95%; hollow: the interval holds 0; ringed: the
        definition of the claim. Intervals by Student's t at 95% over sequences (text: speeches; half of them for
        the head that grows most). {GRIDS}; {TEXT}. One definition that falls where others rise means that the
        claim depends on the definition. One seed of training; the definitions are ours, the paper's is not
        public.""",
    ),
    Exhibit(
        "attention-heads",
        "Heads of text turn to masked keys alike; of Sudoku, unequally",
        ("attention-heads",),
        heads,
        f"""Rise of the masked : clean log-odds of each head of the looped layer, from the first loop to S_max at
        half masked. Heads are ranked on one half of the sequences (hollow) and measured on the other (full;
        95% by Student's t), so that choosing them does not flatter them. {GRIDS}; {TEXT}. A head below 0 turns
        away from masked keys. {OURS} {ONE}""",
    ),
)
