"""Figures of how the state changes from loop to loop."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits.answers import Answer, answer_of, rows_of, units
from loopmdm.analysis.exhibits.registry import GRIDS, ONE, OURS, TEXT, Exhibit, Reading, Tables, panels
from loopmdm.analysis.numbers.estimate import half_width, with_interval
from loopmdm.analysis.plots import representation
from loopmdm.analysis.plots.style import PAGE, mark_trained


def representation_change(loaded: Tables) -> MatplotlibFigure:
    """Relative change with its null, step cosine, KL between successive read-outs, flips."""
    df = with_interval(loaded["representation-change"], "value", "standard_error")
    metrics = (
        ("relative_change", "relative\nchange (share)"),
        ("step_cosine", "cosine of\nsuccessive steps"),
        ("kl_previous", "KL to previous\nread-out (nats)"),
        ("top1_flips", "best token\nflips (share)"),
    )
    drawn, axes = plt.subplots(
        2,
        4,
        figsize=(PAGE, 4.0),
        layout="constrained",
    )
    for row, panel in zip(axes, panels(), strict=True):
        part = panel.of(df[df["token_group"] == "masked"])
        for ax, (metric, label) in zip(row, metrics, strict=True):
            representation.plot_metric_by_loop(part, metric, ax=ax)
            ax.set(title=panel.title, ylabel=label)
            mark_trained(ax, panel.run.s_max, df["loop"].max() + 1)
        representation.plot_drift_null(part, ax=row[0])
        for ax in (row[0], row[2]):
            ax.set_yscale("log")
        row[1].axhline(0, color="#444444", linewidth=0.6)
    for ax in axes[0]:
        ax.set_xlabel("")
    drawn.legend(
        handles=axes[0, 0].get_legend_handles_labels()[0], loc="outside lower center", ncols=4, frameon=False
    )
    return drawn


def lenses(loaded: Tables) -> MatplotlibFigure:
    """What each loop would answer, through the coda and directly."""
    df = with_interval(loaded["representation-change"], "value", "standard_error")
    metrics = (
        ("p_true", "p(true token) (share)"),
        ("entropy", "entropy (nats)"),
        ("kl_previous", "KL to previous (nats)"),
    )
    drawn, axes = plt.subplots(2, 3, figsize=(PAGE, 3.8), layout="constrained")
    for row, panel in zip(axes, panels(), strict=True):
        part = panel.of(df[(df["token_group"] == "masked") & (df["nominal_mask_ratio"] == 0.5)])
        for ax, (metric, label) in zip(row, metrics, strict=True):
            representation.plot_lenses(part, metric, ax=ax)
            ax.set(title=panel.title, ylabel=label)
            mark_trained(ax, panel.run.s_max, part["loop"].max() + 1)
        row[2].set_yscale("log")
    for ax in axes[0]:
        ax.set_xlabel("")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return drawn


def similarity(loaded: Tables) -> MatplotlibFigure:
    """CKA between the states of all pairs of loops, masked positions."""
    df = loaded["similarity"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.9), layout="constrained")
    for ax, panel in zip(axes, panels(), strict=True):
        part = panel.of(df[(df["token_group"] == "masked") & (df["metric"] == "cka")])
        representation.plot_similarity(part, ax=ax)
        ax.set_title(f"{panel.title}, $S_{{max}}$ = {panel.run.s_max}")
    return drawn


def far_out(loaded: Tables) -> MatplotlibFigure:
    """Drift or convergence over 64 loops, and the residual of a fixed point there."""
    df, points = loaded["convergence"], loaded["fixed-points"]
    df = df[df["token_group"] == "masked"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.9), layout="constrained", width_ratios=[1.5, 1])
    representation.plot_far_out(df, ax=axes[0])
    axes[0].set_title("loops 32 to 63, masked positions")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
    labels = []
    for place, panel in enumerate(panels()):
        part = panel.of(points).set_index("metric")
        residual, half = part.loc["residual", "value"], half_width(part, "standard_error")["residual"]
        axes[1].errorbar(residual, place, xerr=half, marker="o", color="#1b4f8f")
        n, found = int(part.loc["verified", "n"]), part.loc["verified", "value"]
        labels.append(f"{panel.title}\n{found:.0%} of {n} verified")
    axes[1].set_yticks(range(len(labels)), labels)
    axes[1].set(xscale="log", xlim=(1e-5, 1), ylim=(1.5, -0.5),
                xlabel="residual ||f(H) − H|| / ||H||\nafter 64 loops (share)",
                title="fixed points")  # fmt: skip
    axes[1].set_xticks([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
    axes[1].set_xticks([], minor=True)
    axes[1].axvline(1e-4, color="#444444", linewidth=0.8, linestyle=":")
    return drawn


def state_paths(loaded: Tables) -> MatplotlibFigure:
    """Paths of mean states in their first two principal components."""
    df = loaded["state-paths"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 3.4), layout="constrained")
    for ax, panel in zip(axes, panels(), strict=True):
        representation.plot_state_paths(panel.of(df[df["token_group"] == "masked"]), ax=ax)
        ax.set_title(panel.title)
    handles, labels = axes[1].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, columnspacing=0.9,
                 handletextpad=0.2)  # fmt: skip
    return drawn


# --- answers to claims ---


def _converge(task: str) -> Answer:
    rows = rows_of("convergence", task, token_group="masked", metric="step_norm")
    n = int(rows["n"].iloc[0])
    return answer_of(rows["value"].to_numpy(), rows["standard_error"].to_numpy(), n, units(task))


# --- what is shown ---

EXHIBITS = (
    Exhibit(
        "representation-change",
        "States still change far beyond S_max",
        ("representation-change",),
        representation_change,
        f"""Change of the state at masked positions from loop to loop, to 3 x S_max. Relative change ||H(i) -
        H(i-1)|| / ||H(i)|| beside the 1/i of a constant drift; cosine of successive steps; KL of each read-out
        to the previous one; share of best tokens that flip. {GRIDS}; {TEXT}. Bands: 95%. A relative change
        that only follows the dotted line is no convergence. {OURS} {ONE}""",
    ),
    Exhibit(
        "lenses",
        "p(true) rises past S_max on Sudoku, peaks before it on text",
        ("representation-change",),
        lenses,
        f"""What each loop would answer at masked positions, half masked: read through the coda, as the model
        would if it stopped there, and by unembedding the state directly, to 3 x S_max. The lenses need not
        agree: the coda is trained to read what the loop leaves, the unembedding is not. (a, d) probability of the
        true token; (b, e) entropy; (c, f) KL to the previous loop's answer. {GRIDS}; {TEXT}. Bands: 95%. Loops
        that refine an answer raise p(true) at least to S_max; a fall there counts against it. {OURS} {ONE}""",
    ),
    Exhibit(
        "similarity",
        "Neighbouring loops are alike; what enters the first is not",
        ("similarity",),
        similarity,
        f"""Linear CKA (debiased) between the states of masked positions after every two loops, to 2 x S_max;
        "in": what enters the first loop. Half masked. {GRIDS}; {TEXT}. Shades are logarithmic in 1 - CKA. 1:
        equal up to rotation and scale, so that a state which only grows counts as unchanged. Neighbours that
        stay below 1 far out would say that loops go on computing. {OURS} {ONE}""",
    ),
    Exhibit(
        "far-out",
        "No model converges, and no fixed point is verified",
        ("convergence", "fixed-points"),
        far_out,
        f"""Far beyond S_max. (a) slopes of the log length of a step and of the log relative change against log
        loop over the later half of 64 loops, every looped model; 95% over sequences (text: speeches). Dotted:
        what a constant drift gives, 0 and -1. Steps that shrink like 1/i still add up without end, so
        convergence needs both slopes below -1.25. (b) how far one more loop moves the state after 64 loops, 16
        sequences, 95%; a fixed point is called verified only where this is below 1e-4 (dotted) and steps have
        shrunk. The paper speaks of refinement that converges; slopes above that count against it. {OURS}""",
        (Reading("loops-converge", _converge, ("convergence", "nll-by-loops")),),
    ),
    Exhibit(
        "state-paths",
        "States leap in the first loop, then drift (illustration)",
        ("state-paths",),
        state_paths,
        f"""Mean states of masked positions of 12 sequences, from what enters the loop (hollow) through each loop
        (the darker, the later) to S_max, in the first two principal components of all of them. An illustration:
        two components hold the share of variance given at the axes, and what looks like standing still may
        move in the others. {GRIDS}; {TEXT}. {OURS} {ONE}""",
    ),
)
