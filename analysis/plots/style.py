"""One palette, one order, one set of sizes; readable in greyscale; byte-stable files.

Loops are counted as the columns count them: `loop`, which one, from 0 (axis `LOOP`); `n_loops`, how many were run,
from 1 (axis `RUN`).
"""

import io
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, Normalize
from matplotlib.figure import Figure

Plot = TypeVar("Plot", bound=Callable[..., Any])
COLUMN, PAGE = 3.35, 6.9
"""Widths in inches: one column, full page."""
LOOP, RUN = "loop (0 = first)", "loops run (S)"
"""Axes of the columns `loop` and `n_loops`."""
ODDS = "log-odds masked : clean (nats)"
MASKED, CLEAN = "#1b4f8f", "#e08214"
"""The key of masked and clean positions in every plot, map and page."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"

ARM_STYLE = {
    "base": {"color": "#8c8c8c", "marker": "s", "linestyle": "--"},
    "deep": {"color": "#e08214", "marker": "^", "linestyle": "-."},
    "loop": {"color": "#1b4f8f", "marker": "o", "linestyle": "-"},
    "loop-s4": {"color": "#6baed6", "marker": "P", "linestyle": "-", "label": "loop,\n$S_{max}$ 4"},
    "base-isolated": {"color": "#c9c9c9", "marker": "D", "linestyle": ":"},
    "loop-isolated": {"color": "#9ecae1", "marker": "v", "linestyle": ":"},
}
CLOSED_STYLE = {arm: ARM_STYLE[arm] for arm in ("base", "loop-s4")} | {
    "base-closed": ARM_STYLE["base-isolated"] | {"label": "base,\nhidden"},
    "loop-s4-closed": ARM_STYLE["loop-isolated"] | {"label": "loop,\nhidden"},
}
"""With masked keys seen, and hidden from all other queries."""
PLACE_STYLE = {
    arm: {"color": colour, "marker": marker, "label": label}
    for arm, colour, marker, label in (
        ("stack", "#8c8c8c", "s", "none"),
        ("loop-first", "#1b4f8f", "o", "1st"),
        ("loop-early", "#1b4f8f", "o", "2nd"),
        ("loop-middle", "#1b4f8f", "o", "3rd"),
        ("loop-late", "#1b4f8f", "o", "4th"),
        ("loop-two", "#e08214", "D", "2nd,\n3rd"),
        ("loop-whole", "#e08214", "^", "all"),
    )
}
"""Which of five layers loop."""
AMOUNT_STYLE = {
    arm: {"color": colour, "marker": marker, "linestyle": line, "label": label}
    for arm, colour, marker, line, label in (
        ("loop-s2", "#9ecae1", "v", ":", "2"),
        ("loop-s4", "#6baed6", "s", "--", "4"),
        ("loop", "#3182bd", "o", "-", "6"),
        ("loop-s8", "#1b4f8f", "^", "-.", "8"),
        ("loop-s12", "#08264d", "D", "-", "12"),
        ("loop-fixed", "#e08214", "P", "--", "6,\nfixed"),
    )
}
"""S_max of training, S drawn uniformly up to it, or fixed."""
PAYS_STYLE = {
    label: {"color": colour, "marker": marker, "linestyle": line}
    for label, colour, marker, line in (
        ("Sudoku 6x6, $S_{max}$ 4", "#1b4f8f", "o", "-"),
        ("Sudoku 6x6, $S_{max}$ 6", "#6baed6", "s", "-"),
        ("Sudoku 9x9", "#08264d", "D", "-"),
        ("text (sotu)", "#e08214", "^", "--"),
        ("text (imdb)", "#b35806", "v", "--"),
        ("text (imdb), d = 48", "#7f3b08", "P", "--"),
        ("text (wiki)", "#fdb863", "<", "--"),
        ("arithmetic", "#542788", "X", "-."),
        ("tree", "#8073ac", ">", "-."),
        ("chain (control)", "#8c8c8c", "h", ":"),
    )
}
"""Where loop less base is followed; not on word problems, whose errors are five times the gaps of all others."""
CUT_STYLE = {
    ("none", False): {"color": "#8c8c8c", "marker": "s", "linestyle": "--", "label": "S = 1"},
    ("none", True): {"color": "#08306b", "marker": "o", "linestyle": "-", "label": "$S_{max}$"},
    ("masked->masked", True): {"color": MASKED, "marker": "v", "linestyle": ":", "label": "masked → masked cut"},
    ("masked->clean", True): {"color": CLEAN, "marker": "^", "linestyle": "-.", "label": "masked → clean cut"},
}
"""Edges cut from the second loop on, and whether there is a second loop."""
KEY_STYLE = {
    "masked": {"color": MASKED, "marker": "o", "linestyle": "-", "label": "masked → masked"},
    "clean": {"color": CLEAN, "marker": "^", "linestyle": "--", "label": "masked → clean"},
    "self": {"color": "#8c8c8c", "marker": ".", "linestyle": ":", "label": "masked → itself"},
}
RATIO_STYLE = {
    0.25: {"color": "#9ecae1", "marker": "o", "linestyle": ":"},
    0.5: {"color": "#4292c6", "marker": "s", "linestyle": "--"},
    0.75: {"color": "#08306b", "marker": "^", "linestyle": "-"},
}
SHARE_STYLE = {
    0.15: {"color": "#8c8c8c", "marker": "D", "linestyle": "--", "label": "15% masked, as in their training"},
    0.5: RATIO_STYLE[0.5] | {"linestyle": "-", "label": "50% masked"},
}
"""How much is masked where models of masked-language training stand beside ours."""
BLOCK_STYLE = (
    {"color": "#8c8c8c", "marker": "s", "linestyle": "--"},
    {"color": "#e08214", "marker": "^", "linestyle": "-."},
    {"color": "#1b4f8f", "marker": "o", "linestyle": "-"},
)
"""Blocks of layers that are repeated, in order."""
NULL = {"color": "#444444", "linewidth": 1.0, "linestyle": (0, (1, 1.5)), "zorder": 1}
FORMATS = ("pdf", "png", "svg")
PARAMETERS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, as do its mathematics: no fonts or LaTeX are asked for
    "text.usetex": False,
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "legend.fontsize": 6.8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "figure.dpi": 110,
    "savefig.dpi": 180,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "loopmdm",
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "ytick.minor.width": 0.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "ytick.minor.size": 1.5,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
}


@contextmanager
def style() -> Iterator[None]:
    """The suite's look, for the drawing inside; the caller's own settings return afterwards, and touch nothing."""
    with mpl.rc_context():
        mpl.rcdefaults()
        sns.set_theme(style="ticks", rc=PARAMETERS)
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)  # a notebook's backend may have switched it on inside


def of_rows(plot: Plot) -> Plot:
    """A plot of a frame that says in one line when the frame has no rows, or lacks a column."""

    @wraps(plot)
    def drawn(df: pd.DataFrame, *args: Any, **kwargs: Any) -> Any:
        try:
            return plot(df, *args, **kwargs)
        except Exception as error:
            if not len(df):
                raise ValueError(f"{plot.__name__}: the frame has no rows; give one that was measured") from error
            if isinstance(error, KeyError) and error.args[0] not in df.columns:
                raise ValueError(f"{plot.__name__}: the frame has no column {error.args[0]!r}") from error
            raise

    return cast(Plot, drawn)


def band(ax: Axes, x, y, low, high, **line) -> None:
    """A line with its interval as a shade; a single point with a bar."""
    ax.plot(x, y, **line)
    if len(x) == 1:
        ax.vlines(x, low, high, color=line.get("color"), linewidth=0.9)
    else:
        ax.fill_between(x, low, high, color=line.get("color"), alpha=0.18, linewidth=0)


def interval_band(ax: Axes, x, df: pd.DataFrame, value: str, **line) -> None:
    """A column as a line, with the interval `low` to `high` as a shade."""
    band(ax, x, df[value], df["low"], df["high"], **line)


def reach(df: pd.DataFrame, value: str) -> np.ndarray:
    """How far `low` and `high` lie from a column [2, row], as error bars want it."""
    return np.abs(df[["low", "high"]].to_numpy().T - df[value].to_numpy())


def mark_s_max(ax: Axes, s_max: int, last: int) -> None:
    """A thin line at the largest loop count of training, and ticks at 1 and its multiples; for an axis `RUN`."""
    ax.axvline(s_max, color="#666666", linewidth=0.8, linestyle="-.", zorder=0)
    ticks = [1, *range(s_max, last + 1, s_max)]
    ax.set_xticks(ticks, [f"{tick}\n$S_{{max}}$" if tick == s_max else str(tick) for tick in ticks])


def mark_trained(ax: Axes, s_max: int, n_loops: int) -> None:
    """A thin line behind the last loop that training knows, and ticks at multiples; for an axis `LOOP`."""
    ax.axvline(s_max - 0.5, color="#666666", linewidth=0.8, linestyle="-.", zorder=0)
    ax.set_xticks(range(0, n_loops, s_max))
    ax.set_xticks([s_max - 0.5], ["\n$S_{max}$"], minor=True)
    ax.tick_params(axis="x", which="minor", length=0)


def root_norm(most: float, signed: bool = False) -> Normalize:
    """A square-root scale to `most`, which leaves small values visible; `signed`: from -most, the same about 0."""
    return FuncNorm((_root, _square), vmin=-most if signed else 0.0, vmax=most)


def _root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.square(values)


def panels_of(figure: Figure) -> list[Axes]:
    """The panels in reading order: axes that are shown, without colour bars."""
    return [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]


def finish(figure: Figure, finding: str) -> None:
    """What every figure of the study carries: what was found as its title, and a letter a panel."""
    shown = panels_of(figure)
    for letter, ax in zip(LETTERS, shown if len(shown) > 1 else [], strict=False):
        ax.annotate(letter, (0, 1), xytext=(-5, 4), xycoords="axes fraction", textcoords="offset points",
                    ha="right", va="bottom", fontweight="bold", fontsize=9)  # fmt: skip
    lines = textwrap.fill(finding, round(13 * figure.get_figwidth()))
    figure.suptitle(lines.replace("S_max", "$\\mathbf{S_{max}}$"), fontsize=9, fontweight="bold")


def described(figure: Figure) -> str:
    """What is seen, for those who do not see it: "2 panels. a: title (y against x); b: ...; colour: ...".

    Axes that are switched off, as under a table, say it by their label.
    """
    shown = panels_of(figure)
    told = [str(ax.get_label()) for ax in figure.axes if not ax.axison and ax.get_label()]
    told += [
        f"{f'{letter}: ' if len(shown) > 1 else ''}{ax.get_title() or 'no title'}{_axes_of(ax)}"
        for letter, ax in zip(LETTERS, shown, strict=False)
    ]
    bars = dict.fromkeys(
        ax.get_ylabel() or ax.get_xlabel() for ax in figure.axes if ax.get_label() == "<colorbar>"
    )
    told += [f"colour: {label}" for label in bars if label]
    count = f"{len(shown)} panels. " if len(shown) > 1 else ""
    text = " ".join(f"{count}{'; '.join(told)}.".split()) if told else ""
    return text.replace("$", "").replace("S_{max}", "S_max").replace("\\", "")


def _axes_of(ax: Axes) -> str:
    known = [label for label in (_label(ax, "y"), _label(ax, "x")) if label]
    return f" ({' against '.join(known)})" if known else ""


def _label(ax: Axes, side: str) -> str:
    """An axis' label; where it is left out, that of the panels in its row (or column)."""
    own = getattr(ax, f"get_{side}label")()
    shared = getattr(ax, f"get_shared_{side}_axes")().get_siblings(ax)
    return own or next((label for each in shared if (label := getattr(each, f"get_{side}label")())), "")


def plainly(text: str) -> str:
    """Text as matplotlib draws it letter by letter: no dollars as mathematics, control characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("$", r"\$")


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG, for notebooks."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
