"""Figures of causal tests: cuts, stale values, the trained 2 x 2, looping without training."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits import declared, tables
from loopmdm.analysis.exhibits.answers import (
    Answer,
    Gate,
    NotRun,
    answer_of,
    by_t,
    given_break,
    left_plateau,
    of_arm,
    rows_of,
    units,
)
from loopmdm.analysis.exhibits.registry import (
    GRIDS,
    MEANS,
    ONE,
    OURS,
    TEXT,
    Exhibit,
    Reading,
    Tables,
    of_models,
    panels,
)
from loopmdm.analysis.numbers import contrasts, stats
from loopmdm.analysis.numbers.estimate import across_seeds, with_interval
from loopmdm.analysis.plots import causal, quality
from loopmdm.analysis.plots.style import ARM_STYLE, CLOSED_STYLE, COLUMN, PAGE

TWO_BY_TWO = ("base", "loop", "base-isolated", "loop-isolated")


def mediated_share(loaded: Tables) -> MatplotlibFigure:
    """What of the gain of looping is lost by cutting, by its controls, and by stale values."""
    df = loaded["mediated-share"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 3.3), layout="constrained", sharey=True, sharex=True)
    for ax, panel in zip(axes, panels(), strict=True):
        part = df[df["model"].isin(panel.seeds)]
        causal.plot_shares(part, ax=ax)
        known = part.dropna(subset=["share"])["model"].nunique()
        ax.set_title(f"{panel.title}: {known} of {part['model'].nunique()} models with a gain")
    axes[1].set_ylabel("")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return drawn


def cut_effects(loaded: Tables) -> MatplotlibFigure:
    """Heat maps of what cutting masked-to-masked, or stale values, cost at one loop alone; a scale a row."""
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.0), layout="constrained", sharey=True)
    shown = {"cut-effects": "masked → masked cut", "stale-effects": "values of the first loop"}
    frames = {name: with_interval(loaded[name].loc[~loaded[name]["onward"]], "effect") for name in shown}
    for row, panel in zip(axes, panels(), strict=True):
        most = 1e3 * max(float(panel.of(df)["effect"].abs().max()) for df in frames.values())
        for ax, (name, what) in zip(row, shown.items(), strict=True):
            causal.plot_effects(panel.of(frames[name]), most=most, ax=ax)
            ax.set_title(f"{panel.title}: {what}")
        row[1].set_ylabel("")
        bar = drawn.colorbar(row[0].images[0], ax=list(row), label="NELBO lost (nats / 1000;\nsquare-root scale)")
        ends = [step for step in (10, 30, 100, 300, 1000) if step <= most][-3:]
        bar.set_ticks([-ends[-1], -ends[0], 0, *ends])
        bar.ax.minorticks_off()
    drawn.supxlabel("a number in brackets, grey: its 95% interval holds 0", fontsize=7)
    return drawn


EDGE_LABELS = {
    "masked->masked": "masked → masked",
    "clean->masked": "clean → masked",
    "any->masked": "any → masked",
    "masked->clean": "masked → clean",
    "within": "equal mass:\nmasked → masked",
    "outside": "equal mass:\nmasked → clean",
}
RELATION_LABELS = {"box": "same box", "row": "same row", "column": "same column", "none": "none"}


def causal_edges(loaded: Tables) -> MatplotlibFigure:
    """What edges carry in nats, loop 0 intact: groups, sides of equal mass, relations, shares."""
    df = loaded["causal-edges"]
    df = with_interval(of_models(df[df["mask_ratio"].isna()]), "effect")
    whole = df[(df["share"] == 1) & (df["relation"] == "any")]
    whole = whole.assign(group=whole["edges"].where(whole["side"] == "all", whole["side"]))
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 5.4), layout="constrained", height_ratios=(6, 4))
    for ax, panel in zip(axes[0], panels(), strict=True):
        part = whole[whole["model"].isin(panel.seeds)]
        causal.plot_edges(part, "group", EDGE_LABELS, _gain(part), ax=ax)
        ax.set_title(panel.title)
    axes[0, 0].set_xscale("symlog", linthresh=0.5)
    axes[0, 0].set_xticks([0, 0.2, 0.4, 1, 2, 4], ["0", "0.2", "0.4", "1", "2", "4"])
    axes[0, 0].set_xticks([], minor=True)
    axes[0, 0].set_xlabel("NELBO lost (nats per token; linear to 0.5, then log)")
    axes[0, 1].set(yticklabels=[], ylabel="")
    axes[0, 1].locator_params(axis="x", nbins=5)
    axes[0, 1].legend(frameon=False, loc="lower right")
    first = panels()[0]
    ours = df[df["model"].isin(first.seeds)]
    related = ours[(ours["relation"] != "any") | (ours["kind"] == "one loop")]
    causal.plot_edges(related, "relation", RELATION_LABELS, _gain(related), ax=axes[1, 0])
    axes[1, 0].set_title(f"{first.title}: masked → masked, by relation")
    dose = ours[(ours["edges"] == "masked->masked") & (ours["relation"] == "any") & (ours["side"] == "all")]
    causal.plot_dose(across_seeds(dose, "effect", ["kind", "share"]), ax=axes[1, 1])
    axes[1, 1].set_title(f"{first.title}: a random share")
    return drawn


def _gain(df: pd.DataFrame) -> float:
    """What all loops are worth: the mean loss with one loop."""
    return stats.over_seeds(df.loc[df["kind"] == "one loop", "effect"].to_numpy())[0]


def two_by_two(loaded: Tables) -> MatplotlibFigure:
    """Looping x what is seen of masked keys in the middle layer, both in training; declared runs on the right."""
    df = loaded["nll-by-loops"]
    df = df[(df["task"] == "sudoku") & (df["n_loops"] == df["max_loops"])]
    shown = [("masked to masked cut", df[df["arm"].isin(TWO_BY_TWO)], ARM_STYLE)]
    runs = declared.two_by_two("sudoku")
    if runs is not None:
        names = [run.name for arm in runs.values() for run in arm]
        shown.append(("masked keys hidden from all others", df[df["model"].isin(names)], CLOSED_STYLE))
    size = (COLUMN * len(shown), 2.7)
    drawn, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for ax, (title, part, looks) in zip(axes[0], shown, strict=True):
        quality.plot_arms(across_seeds(part, "nll", ["arm"]), "nll", looks, ax=ax)
        ax.set(title=f"6x6 Sudoku, {title}", xlabel="arm (seeds)")
    axes[0, 0].set_ylabel("test NELBO (nats per token)")
    return drawn


def training_free(loaded: Tables) -> MatplotlibFigure:
    """Looping the middle of base models: NELBO, and masked-to-masked log-odds."""
    df = of_models(loaded["training-free"])
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.2), layout="constrained", sharex=True)
    for row, panel in zip(axes, panels(), strict=True):
        part = df[df["task"] == panel.run.task]
        for ax, value, label in ((row[0], "change", "NELBO less that at S = 1\n(nats per token)"),
                                 (row[1], "rise", "rise of log-odds\nmasked : clean (nats)")):  # fmt: skip
            means = across_seeds(part, value, ("damping", "n_loops"), f"{value}_se")
            causal.plot_training_free(means, ax=ax)
            ax.set(title=f"{panel.title}: base models", ylabel=label)
            if ax.get_subplotspec().is_first_row():
                ax.set_xlabel("")
    axes[0, 0].legend(frameon=False)
    return drawn


# --- answers to claims ---


def _four_arms(task: str) -> list[pd.DataFrame]:
    """Rows at S_max of loop and base, then of both with masked keys hidden: the declared runs, if there."""
    df = tables.load("nll-by-loops")
    df = df[(df["task"] == task) & (df["n_loops"] == df["max_loops"])].sort_values("seed")
    runs = declared.two_by_two(task)
    if runs is None:
        return [df[df["arm"] == arm] for arm in ("loop", "base", "loop-isolated", "base-isolated")]
    return [df[df["model"].isin([run.name for run in part])] for part in runs.values()]


def _two_by_two(task: str) -> Answer:
    """Of runs that left the plateau, in all four arms."""
    whole = _four_arms(task)
    left = [rows["nll"][left_plateau(rows["model"], task)].to_numpy() for rows in whole]
    if min(map(len, left)) < 2:
        raise NotRun
    counts = [f"{rows['arm'].iloc[0]} {len(part)} of {len(rows)}" for rows, part in zip(whole, left, strict=True)]
    seeds, n, told = min(map(len, left)), int(whole[0]["n"].iloc[0]), "left the plateau: " + ", ".join(counts)
    return by_t(*contrasts.contrast(left, (1, -1, -1, 1)), seeds, n, told)


def _loop_beats_base(task: str) -> Gate:
    """Whether looping helps at all where nothing is hidden: else there is no gain to lose."""
    loop, base, *_ = _four_arms(task)
    found = given_break(task, loop, base)
    return Gate(found.high < 0, f"loop less base {found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})")


def _edges(task: str, column: str, **where: object) -> Answer:
    """A column of causal-edges, nats at S_max with the first loop intact: masked to masked, resampled values."""
    rows = rows_of(
        "causal-edges", task, kind="resample", edges="masked->masked", relation="any", share=1.0, **where
    )
    rows = rows[rows["mask_ratio"].isna()].sort_values("model")
    values, errors = rows[column].to_numpy(), rows[f"{column}_se"].to_numpy()
    return answer_of(values, errors, int(rows["n"].iloc[0]), int(rows["n_units"].iloc[0]))


def _interact(task: str) -> Answer:
    return _edges(task, "effect", side="all")


def _needs_mask_to_mask(task: str) -> Answer:
    """Beside edges to clean keys of equal mass, the same queries."""
    return _edges(task, "excess", side="within")


def _update_matters(task: str) -> Answer:
    """In nats lost, as a geometric mean over runs that lie orders of magnitude apart."""
    rows = rows_of("mediated-share", task, edges="stale", matched=False).sort_values("model")
    lost = (rows["gain_intact"] - rows["gain"]).to_numpy()
    errors = np.hypot(rows["gain_intact_se"], rows["gain_se"]).to_numpy()
    n, n_units = int(rows["n"].iloc[0]), int(rows["n_units"].iloc[0])
    if (lost <= 0).any():
        return answer_of(lost, errors, n, n_units)
    found = answer_of(np.log(lost), errors / lost, n, n_units)
    estimate, low, high = np.exp([found.estimate, found.low, found.high]).tolist()
    return replace(found, estimate=estimate, low=low, high=high, p=lambda margin: found.p(float(np.log(margin))))


def _training_free(task: str) -> Answer:
    rows = of_arm(tables.load("training-free"), task, "base")
    rows = rows[(rows["n_loops"] == 2) & (rows["damping"] == "1/n_loops")]
    if rows.empty:
        raise NotRun
    n = int(rows["n"].iloc[0])
    return answer_of(rows["change"].to_numpy(), rows["change_se"].to_numpy(), n, units(task))


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "mediated-share",
        "Cutting masked → masked undoes looping; random cuts cost less",
        ("mediated-share",),
        mediated_share,
        f"""How much of the gain of looping (NELBO at S = 1 less at S_max) is lost under cuts. Cut in the looped
        layer: attention among masked positions, random edges of equal mass and distance instead,
        masked-to-clean; or masked keys keep the values they had in the first loop. One mark a training seed;
        bars: 95% over sequences (text: over speeches). {GRIDS}; {TEXT}; two masks each. If random cuts lost as
        much, the gain would not need masked-to-masked attention. 0: the gain survives; 1: nothing is left; above
        1: looping hurts after the cut (linear to 2, logarithmic on grey); models without a measurable gain have
        no share. {OURS}""",
        (Reading("update-matters", _update_matters, ("mediated-share",)),),
    ),
    Exhibit(
        "cut-effects",
        "Masked → masked matters late on Sudoku, in loop 0 on text",
        ("cut-effects", "stale-effects"),
        cut_effects,
        f"""NELBO lost at S_max, in thousandths of a nat per masked token, by one change at one loop, by
        mask ratio: attention among masked positions cut (a, c), masked keys' values of the first loop in their
        place (b, d). In brackets: the 95% interval holds 0; a scale a row. 128 test sequences, two masks each.
        Both arms on one attention path, paired by sequence and mask. Numbers near 0 would say that loops do not
        use what masked positions tell each other. {OURS} {ONE}""",
    ),
    Exhibit(
        "causal-edges",
        "At equal mass, edges to clean keys carry more",
        ("causal-edges",),
        causal_edges,
        f"""What attention edges of the looped layer carry, in nats per token at S_max, with the first loop
        intact. They are cut, or their keys hand on another sequence's values under the same mask (pattern, mass
        and scale are kept), or the mean of ten draws of such. Any → masked also closes relays through clean
        positions. The lower two groups of a and b: random edges of masked queries, to masked and to clean keys,
        of equal mass for each query and head (ten draws where cut, else two). Sudoku: by where two cells meet
        (c; a box before a row or column), and random shares (d) of masked → masked. One mark a training seed,
        95% over 64 test grids (text: over 8 speeches), four masks each; dashed: the mean gain of looping;
        shares: means, and thin lines for single seeds. If loops did not use what masked positions tell each
        other, another sequence's values would cost nothing there. {OURS}""",
        (
            Reading("masked-positions-interact", _interact, ("causal-edges",)),
            Reading("gain-needs-mask-to-mask", _needs_mask_to_mask, ("causal-edges",)),
        ),
    ),
    Exhibit(
        "trained-two-by-two",
        "Without the masked positions' word, looping shows no gain",
        ("nll-by-loops",),
        two_by_two,
        """Test NELBO of Sudoku models trained with and without looping, one mark a training seed (their number
        in brackets), the loop arms at S_max; bars: means. (a) S_max 6: with and without masked-to-masked
        attention in their middle layer ("isolated"), where clean cells still pass on what masked ones hold. b,
        S_max 4, seeds 5 to 9, declared before their results: masked keys hidden from all other queries there, so
        no relay is left. Equal size and training FLOPs; 1,000 grids of unseen classes, one mask each. If looping
        gained as much without the masked positions' word, the paper's explanation of why looping works would be
        wrong. The design is ours.""",
        (
            Reading(
                "trained-without-mask-to-mask", _two_by_two, ("nll-by-loops", "learning-curves"), _loop_beats_base
            ),
        ),
    ),
    Exhibit(
        "training-free",
        "Looping models that never looped raises their NELBO",
        ("training-free",),
        training_free,
        f"""Models that were never looped, with their middle layer run S times: in full steps and damped by 1/S.
        (a, c) change of the NELBO. (b, d) rise of the masked-to-masked log-odds from the first to the last loop at
        half masked, self excluded. {GRIDS}; {TEXT}; one mask each. {MEANS} If the log-odds rise here, too, a
        rise in looped models says nothing about training with loops. Definitions are ours.""",
        (Reading("training-free", _training_free, ("training-free", "nll-by-loops")),),
    ),
)
