"""The registry of figures: name -> tables, builder, caption. Batch, notebooks and tests all use it.

from analysis import figures
figures.FIGURES["mask-to-mask-by-loop"].draw(out="figures/out")
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as MatplotlibFigure

from analysis import provenance, tables, zoo
from analysis.plots import attention, quality, representation
from analysis.plots.style import FORMATS, PAGE, mark_s_max, style
from loopmdm_model.errors import unknown_name
from loopmdm_model.files import write_atomic, write_json
from loopmdm_model.training.record import commit, versions

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Figure:
    """One figure: the `tables` it is drawn from, its `builder`, and a caption with its claim."""

    name: str
    tables: tuple[str, ...]
    builder: Callable[[Tables], MatplotlibFigure]
    caption: str

    def draw(self, out: Path | str | None = None) -> MatplotlibFigure:
        """Draw from the tables; with `out` also write pdf, png, svg and a JSON sidecar there."""
        loaded = {name: tables.load(name) for name in self.tables}
        with style():
            figure = self.builder(loaded)
            if out is not None:
                self._write(figure, Path(out), loaded)
        plt.close(figure)
        return figure

    def _write(self, figure: MatplotlibFigure, out: Path, loaded: Tables) -> None:
        dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
        for kind in FORMATS:
            write_atomic(
                out / f"{self.name}.{kind}",
                lambda path, kind=kind: figure.savefig(path, format=kind, metadata=dates[kind]),
            )
        write_json(out / f"{self.name}.json", self.sidecar(loaded))

    def sidecar(self, loaded: Tables) -> dict:
        """Caption, hashes of tables and models, commit, versions and command."""
        return {
            "figure": self.name,
            "caption": self.text,
            "tables": {name: frame.attrs["values_sha256"] for name, frame in loaded.items()},
            "models": {k: v for frame in loaded.values() for k, v in frame.attrs["models"].items()},
            "commit": commit(),
            "versions": versions(provenance.DRAWING),
            "command": f"loopmdm figures {self.name}",
        }

    @property
    def text(self) -> str:
        """The caption on one line."""
        return " ".join(textwrap.dedent(self.caption).split())


def figure(name: str) -> Figure:
    """A figure of the registry."""
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    return FIGURES[name]


# --- builders ---

PANELS = (("sudoku-loop", "Sudoku 6x6"), ("sotu-loop", "text (sotu)"))


def _looped(df: pd.DataFrame, model: str, longest: bool = True) -> pd.DataFrame:
    """Masked queries, heads pooled, of the looped layer, read to 3 x S_max (or to S_max)."""
    part = df[(df["model"] == model) & (df["query_group"] == "masked") & df["head"].isna()]
    n_loops = part["n_loops"].max() if longest else part["n_loops"].min()
    return part[part["n_loops"] == n_loops]


def mask_to_mask(loaded: Tables) -> MatplotlibFigure:
    """Mass at half masked, log-odds at three ratios, and the layers outside the loop."""
    df = loaded["mask-attention"]
    drawn, axes = plt.subplots(2, 3, figsize=(PAGE, 4.2), layout="constrained", width_ratios=[1, 1, 0.9])
    for row, (model, title) in zip(axes, PANELS, strict=True):
        part = _looped(df, model)
        loop = part[part["segment"] == "loop"]
        half = loop[np.isclose(loop["nominal_mask_ratio"], 0.5)]
        attention.plot_mass_by_loop(half, ax=row[0])
        row[0].set_title(f"{title}: mass, 50% masked")
        log_odds = loop[loop["key_group"] == "masked"]
        attention.plot_log_odds_by_loop(log_odds, ax=row[1])
        row[1].set_title(f"{title}: log-odds")
        for ax in row[:2]:
            mark_s_max(ax, zoo.s_max(model), len(half["loop"].unique()))
        rest = _looped(df, model, longest=False)
        rest = rest[(rest["segment"] != "loop") & (rest["key_group"] == "masked")]
        attention.plot_log_odds_by_layer(rest, ax=row[2])
        row[2].set_title(f"outside the loop (S = {zoo.s_max(model)})")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[0, 1].get_legend_handles_labels()[0]]
    drawn.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, columnspacing=1.2)
    return drawn


def representation_change(loaded: Tables) -> MatplotlibFigure:
    """Relative change with its null, step cosine, KL between successive read-outs, flips."""
    df = loaded["representation-change"]
    metrics = (
        ("relative_change", "relative change"),
        ("step_cosine", "cosine of successive steps"),
        ("kl_previous", "KL to previous read-out (nats)"),
        ("top1_flips", "best token flips (share)"),
    )
    drawn, axes = plt.subplots(
        2,
        4,
        figsize=(PAGE, 3.7),
        layout="constrained",
    )
    for row, (model, title) in zip(axes, PANELS, strict=True):
        part = df[(df["model"] == model) & (df["token_group"] == "masked")]
        for ax, (metric, label) in zip(row, metrics, strict=True):
            representation.plot_metric_by_loop(part, metric, ax=ax)
            ax.set_title(label)
            mark_s_max(ax, zoo.s_max(model), df["loop"].max() + 1)
        representation.plot_drift_null(part, ax=row[0])
        for ax in (row[0], row[2]):
            ax.set_yscale("log")
        row[1].axhline(0, color="#444444", linewidth=0.6)
        row[0].set_ylabel(f"{title}\n{row[0].get_ylabel()}")
    for ax in axes[0]:
        ax.set_xlabel("")
    drawn.legend(
        handles=axes[0, 0].get_legend_handles_labels()[0], loc="outside lower center", ncols=4, frameon=False
    )
    return drawn


ARMS = ("base", "deep", "loop")


def _arms(df: pd.DataFrame, task: str) -> pd.DataFrame:
    return df[(df["task"] == task) & df["arm"].isin(ARMS)]


def nll_by_loops(loaded: Tables) -> MatplotlibFigure:
    """NELBO by S of all arms, and its paired change from S = 1 for the looped one."""
    df, references = loaded["nll-by-loops"], loaded["references"]
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 4.4), layout="constrained")
    for row, (model, title) in zip(axes, PANELS, strict=True):
        task = model.split("-")[0]
        part = _arms(df, task)
        looped = part[part["arm"] == "loop"]
        quality.plot_nll_by_loops(part, ax=row[0])
        row[0].set_title(f"{title}: level")
        quality.plot_change_by_loops(looped, ax=row[1])
        row[1].set_title(f"{title}: loop, change from S = 1")
        bottom = part["nll"].min()
        top = max(looped["nll"].max(), part.loc[part["n_loops"] == 1, "nll"].max())
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
            top, bottom = max(top, bigram), min(bottom, bigram)
        row[0].set_ylim(bottom - 0.08 * (top - bottom), top + 0.25 * (top - bottom))
        row[0].legend(frameon=False, loc="upper center")
    return drawn


def sudoku_solve_rate(loaded: Tables) -> MatplotlibFigure:
    """One-shot solve rate by S."""
    drawn, ax = plt.subplots(figsize=(3.6, 2.6), layout="constrained")
    df = loaded["sudoku-solve-rate"]
    quality.plot_solve_rate(_arms(df[df["n_clues"] == 20], "sudoku"), ax=ax)
    ax.legend(frameon=False, loc="lower right")
    ax.set_title("6x6 Sudoku, 16 of 36 cells hidden")
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
    words = [true.strip() or "␣" for true in rows["query_true"]]
    labels = [f"[{word}]" if hidden else word for word, hidden in zip(words, masked, strict=True)]
    drawn, axes = plt.subplots(2, 2, figsize=(PAGE, 6.3), layout="constrained")
    attention.draw_maps(list(axes.flat), stacks[head], loops, labels, masked)
    drawn.suptitle(
        f"sotu-loop, layer {rows['layer'].iloc[0]}, head {head}; [true tokens] of masked positions",
        fontsize=8,
    )
    return drawn


def _matrix(part: pd.DataFrame) -> np.ndarray:
    return part.pivot(index="query", columns="key", values="attention").to_numpy()


def learning_curves(loaded: Tables) -> MatplotlibFigure:
    """Validation NELBO against training FLOPs."""
    df = loaded["learning-curves"]
    drawn, axes = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")
    for ax, (model, title) in zip(axes, PANELS, strict=True):
        quality.plot_learning_curves(_arms(df, model.split("-")[0]), ax=ax)
        ax.set_title(title)
        ax.legend(frameon=False)
    return drawn


_SEEDS = """Lines: means over training seeds (numbers in the legend), thin ones single seeds; bands: 95%, by
Student's t over seeds, over test items where there is one seed."""
_OURS = "Definitions are ours; the paper's are not public. One seed of training."
_TEXT = "256 test blocks of 64 tokens from 8 unseen speeches (errors over speeches)"
_GRIDS = "256 grids of unseen classes (errors over grids)"

FIGURES = {
    item.name: item
    for item in (
        Figure(
            "mask-to-mask-by-loop",
            ("mask-attention",),
            mask_to_mask,
            f"""Attention of masked queries in the looped layer, by loop, to 3 x S_max. Left: mean mass on other
            masked keys, on clean keys and on itself, heads averaged; dotted: chance, the mean share of such
            keys. Middle: log-odds of a masked against a clean key, self excluded; 0 = the head does not care.
            Right: the same in the layers outside the loop. {_GRIDS}; {_TEXT}. Bands and bars: 95%. Loop i is
            the same for every n_loops > i, so there is one curve. The paper reports that mask-to-mask
            attention rises with the loop count and saturates near S_max; a flat or falling curve counts
            against it. {_OURS}""",
        ),
        Figure(
            "representation-change",
            ("representation-change",),
            representation_change,
            f"""Change of the state at masked positions from loop to loop, to 3 x S_max: relative change
            ||H(i) - H(i-1)|| / ||H(i)|| beside the 1/i of a constant drift; cosine of successive steps; KL of
            each read-out to the previous one; share of best tokens that flip. {_GRIDS}; {_TEXT}. Bands: 95%.
            A relative change that only follows the dotted line is no convergence. {_OURS}""",
        ),
        Figure(
            "nll-by-loops",
            ("nll-by-loops", "references"),
            nll_by_loops,
            f"""Test NELBO by number of loops, to 3 x S_max (dash-dotted: S_max of training). Base models were
            trained without looping at the same size and training FLOPs; their curve beyond S = 1 is looping
            without training for it and may leave the panel. Left: level. Right: paired change from S = 1.
            1,000 grids of unseen classes; all 1,957 test blocks of 8 unseen speeches; one mask a sequence.
            {_SEEDS} The paper: more loops, lower NLL, also beyond S_max, and S = 1 worse than the base model.""",
        ),
        Figure(
            "sudoku-solve-rate",
            ("sudoku-solve-rate",),
            sudoku_solve_rate,
            f"""Share of 6x6 puzzles solved in one shot (every hidden cell filled at once with its best symbol;
            any valid completion counts), 16 of 36 cells hidden, 500 grids of unseen classes. {_SEEDS} base: same
            size, same training FLOPs, no looping in training; deep: the looped layer untied. The puzzle set and
            the one-shot protocol are ours; the paper's are not public. A loop curve that does not rise above
            the base arm's S = 1 would count against the claim that looping helps.""",
        ),
        Figure(
            "attention-maps",
            ("attention-maps",),
            attention_maps,
            f"""Attention of one head of sotu-loop at three loops, and last minus first. The first 32 tokens of one
            test block, drawn by seed before looking; half of them masked (in brackets, with the true token).
            The head is the one that changes most: an illustration, n = 1, not a test. The map at loop i is the
            map a run with n_loops = i ends on. {_OURS}""",
        ),
        Figure(
            "learning-curves",
            ("learning-curves",),
            learning_curves,
            f"""Validation NELBO of EMA weights against training FLOPs (3 x forward, warm-up then constant rate),
            each arm at S_max of its training; loop and base at equal size, all at equal budgets. 128 validation
            sequences, two masks each. {_SEEDS} The paper: the looped model reaches the base model's NLL with
            fewer FLOPs; a loop curve that stays above the base curve counts against it.""",
        ),
    )
}
