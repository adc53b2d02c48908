"""Figures of who tells whom: what edges carry, who writes the answer, which way a change goes, what heads say."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits.answers import (
    Answer,
    Gate,
    mean_over_runs,
    over_runs,
    rows_of,
    settled_runs,
)
from loopmdm.analysis.exhibits.registry import (
    HALF_MASKED,
    SOLVER,
    TITLES,
    Exhibit,
    Reading,
    Tables,
    taken_apart,
)
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.plots import cards, edges, mechanism
from loopmdm.analysis.plots.style import PAGE


def who_tells_whom(loaded: Tables) -> MatplotlibFigure:
    """What edges carry by relation, group and loop; and what two-hop paths carry by way of whom."""
    df, relays = (
        with_interval(loaded[name], "value", "standard_error") for name in ("edge-effects", "relay-effects")
    )
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 5.6), layout="constrained", width_ratios=[1.7, 1])
    df = df[(df["method"] == "exact") & (df["metric"] == "kl") & (df["queries"] == "masked")]
    df = df[df["model"].isin(taken_apart().values())]
    most = 1e3 * float(df["value"].max())
    for row, (title, model) in zip(axes, taken_apart().items(), strict=True):
        edges.plot_edge_effects(df[df["model"] == model], most=most, ax=row[0])
        paths = relays[(relays["model"] == model) & (relays["metric"] == "kl") & (relays["relation"] != "any")]
        first = paths[(paths["loop"] == 0) & (paths["second"] == 1)]
        edges.plot_relays(first, ax=row[1])
        row[0].set_title(f"{title}: what masked hear")
        row[1].set_title("two hops, loop 0 then loop 1")
        row[1].set_ylim(0, 1.3 * row[1].get_ylim()[1])  # room for the legend above the bars
        row[1].legend(frameon=False, loc="upper right")
    return drawn


def logit_attribution(loaded: Tables) -> MatplotlibFigure:
    """Which head and MLP of which loop writes the answer."""
    df = loaded["logit-attribution"]
    df = df[df["read"] == "direct"]
    drawn, axes = plt.subplots(2, 1, figsize=(PAGE, 5.0), layout="constrained")
    for ax, (title, model) in zip(axes, taken_apart().items(), strict=True):
        mechanism.plot_attribution(df[df["model"] == model], ax=ax)
        ax.set_title(title)
    axes[0].set_xlabel("")
    return drawn


def attribution_patching(loaded: Tables) -> MatplotlibFigure:
    """What a changed clean token does through which head and MLP of which loop: exact above, by gradient below."""
    df = loaded["attribution-patching"]
    df = df[(df["model"] == SOLVER) & (df["place"] == "all")]
    drawn, axes = plt.subplots(2, 1, figsize=(PAGE, 5.0), layout="constrained")
    most = float(df[["exact", "value"]].abs().max().max())
    for ax, value, title in zip(axes, ("exact", "value"), ("patched", "attributed by gradient"), strict=True):
        mechanism.plot_patching(df.dropna(subset=[value]), value=value, most=most, ax=ax)
        ax.set_title(f"{TITLES['sudoku']}, $S_{{max}}$ 4: {title}")
    axes[0].set_xlabel("")
    return drawn


def head_cards(loaded: Tables) -> MatplotlibFigure:
    """Where each looped head of the Sudoku model looks, and what it does for the symbols on clues."""
    df = with_interval(loaded["head-cards"], "value", "standard_error")
    df = df[(df["model"] == SOLVER) & (df["weights"] == "trained")]
    heads = sorted(df["head"].dropna().unique())
    drawn, axes = plt.subplots(2, len(heads), figsize=(PAGE, 4.3), layout="constrained", sharey="row")
    for column, head in zip(axes.T, heads, strict=True):
        own = df[df["head"] == head]
        cards.plot_head_attention(own, ax=column[0])
        cards.plot_head_effects(own, ax=column[1])
        labels = ", ".join(dict.fromkeys(own.sort_values("loop")["label"]))
        column[0].set(title=f"head {head}: {labels}", xlabel="")
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    keys = [row[0].get_legend_handles_labels() for row in axes]
    for ax in axes.flat:
        ax.get_legend().remove()
    for (handles, labels), title, side in zip(keys, ("looks at", "read"), ("left", "right"), strict=True):
        drawn.legend(handles, labels, title=title, loc=f"outside lower {side}", ncols=len(labels), frameon=False,
                     columnspacing=0.9, handletextpad=0.4, title_fontsize=6.8)  # fmt: skip
    return drawn


# --- answers to claims ---


def _by_relay(task: str) -> pd.DataFrame:
    rows = rows_of("relay-effects", task, metric="kl", relation="any")
    return rows.groupby(["model", "relay"])["value"].mean().unstack()


def _relays(task: str) -> Answer:
    found = _by_relay(task)
    values = settled_runs(found["masked"] - 10 * found["clean"], task, fresh=task != "sudoku")
    rows = rows_of("relay-effects", task, metric="kl", relation="any")
    return over_runs(values, int(rows["n"].min()))


def _relays_carry(task: str) -> Gate:
    values = settled_runs(_by_relay(task)["masked"], task, fresh=task != "sudoku")
    mean, error = mean_over_runs(values)
    told = f"paths by masked relays carry {1e3 * mean:.2f} thousandths of a nat (SE {1e3 * error:.2f})"
    return Gate(mean > 2 * error, told)


def _taken(task: str) -> Answer:
    rows = rows_of("head-cards", task, metric="now", of="clean", weights="trained", loop=0)
    return over_runs(settled_runs(rows.groupby("model")["value"].mean(), task, fresh=False), int(rows["n"].min()))


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
    return over_runs(settled_runs(found[True] - found[False], task, fresh=task != "sudoku"), n)


def _change_costs(task: str) -> Gate:
    rows = rows_of("attribution-patching", task, place="all")
    values = settled_runs(rows.groupby("model")["total"].first(), task, fresh=task != "sudoku")
    mean, error = mean_over_runs(values)
    told = f"the changed token costs {-mean:.2f} nats in all (SE {error:.2f})"
    return Gate(mean < -0.1 and mean + 2 * error < 0, told)


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "who-tells-whom",
        "Sudoku: clues speak throughout, hidden cells late; text: loop 0",
        ("edge-effects", "relay-effects"),
        who_tells_whom,
        f"""What masked positions are told, in which loop: KL of the answer (thousandths of a nat) when, in one
        loop alone, the edges of a group carry keys and values of the same sequence with one clean token changed.
        (a, c) by relation (on a board; by distance on text) and by what the key holds (c clean, m masked),
        brackets where the 95% interval holds 0. (b, d) paths of two hops, changed token to relay to receiver, by
        the relation of the second hop and by what the relay holds. 32 boards, 32 blocks of text. {HALF_MASKED}
        Communication along constraints would be contradicted by edges without a common unit that carry as much,
        relays among hidden cells by clean relays that do. Definitions are ours.""",
        (Reading("relays-are-hidden", _relays, ("relay-effects", "learning-curves"), _relays_carry),),
    ),
    Exhibit(
        "logit-attribution",
        "Loops write the answer on Sudoku, hardly on text",
        ("logit-attribution",),
        logit_attribution,
        f"""Share of the logit difference, true less best wrong token at masked positions, that each head and MLP
        of each loop writes: final norm frozen, so that the shares sum to the difference. {HALF_MASKED} A map
        of another sign or order when writes are left out one by one (table logit-attribution, read "exact")
        would count against reading it as cause. The best wrong token is chosen for its luck: sums are biased
        downwards on text. The decomposition is standard; loops as its axis are ours.""",
    ),
    Exhibit(
        "attribution-patching",
        "A changed clue works through the prelude and later loops",
        ("attribution-patching",),
        attribution_patching,
        """What a changed clue does to logit(true) - logit(a random wrong symbol) through each head and MLP of
        each loop. (a) the corrupted run's activation is patched in (32 boards), (b) first-order attribution (64
        boards, two forwards and one backward for all). Half of the cells hidden; one run, S_max 4. In loops
        the order is nearly the same (Spearman 0.90) and the sign at 79% of the parts, the sizes are not: the
        gradient says less than half; in the prelude its sign is wrong, as a changed token is no small step.
        Effects of the first loop as large as those of later ones would count against a refinement over loops.
        The method is Nanda 2023 and Kramar et al. 2024; loops as nodes are ours.""",
        (
            Reading(
                "later-loops-carry-a-change", _later, ("attribution-patching", "learning-curves"), _change_costs
            ),
        ),
    ),
    Exhibit(
        "head-cards",
        'Column and row heads; whether they say "taken" is undecided',
        ("head-cards",),
        head_cards,
        """What each looped head of one Sudoku model does, loop by loop. (a to d) where hidden cells look, by
        relation; the label is by rule. (e to h) logit of the symbols that clues hold less the others, at full
        attention through W_O and the unembedding alone (direct), to first order through all that follows
        (gradient), read out right after the loop (now), and at the end when the head's write is removed
        (removed; all at the query). Below 0 the head says "taken". 128 boards, half hidden, 48 for what heads
        do; bars: 95% over boards. Untrained heads that get labels, or reads of opposite sign, would count
        against it. Definitions are ours.""",
        (Reading("heads-say-what-is-taken", _taken, ("head-cards", "learning-curves"), _untrained_heads),),
    ),
)
