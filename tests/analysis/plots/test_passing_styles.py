"""Every public plot takes `ax` and gives it back, and its `kws` reach the artists that draw the data."""

import inspect
from importlib import import_module
from pkgutil import iter_modules

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from loopmdm.analysis import exhibits, plots
from loopmdm.analysis.plots.style import style

WHOLE = {
    "plot_card": "a figure of several panels, built of plots that take both",
    "plot_claims": "a table of words and intervals, not of one kind of mark",
}
"""Whole figures, and why they are styled as one."""
MODULES = [import_module(found.name) for found in iter_modules(plots.__path__, f"{plots.__name__}.")]
PUBLIC = {
    (module.__name__.rpartition(".")[2], name): plot
    for module in MODULES
    for name, plot in vars(module).items()
    if name.startswith("plot_") and plot.__module__ == module.__name__
}
INK, ALPHA = "#12ab34", 0.123
MARK, MAP = {"color": INK, "label": "own"}, {"cmap": "cividis"}
STYLED = [
    ("attention", "plot_other_seeds", "mask-to-mask-by-loop", MARK),
    ("attention", "plot_log_odds_by_layer", "mask-to-mask-by-loop", MARK),
    ("attention", "plot_by_s_max", "saturation", MARK),
    ("attention", "plot_specifications", "specification-curve", MARK),
    ("attention", "plot_heads", "attention-heads", MARK),
    ("candidates", "plot_candidates", "pencil-marks", {"facecolors": INK}),
    ("candidates", "plot_deaths", "candidates", MAP),
    ("candidates", "plot_live", "candidates", MARK),
    ("causal", "plot_shares", "mediated-share", MARK),
    ("edges", "plot_relays", "who-tells-whom", MARK),
    ("known", "plot_orders", "sudoku-orders", MARK),
    ("known", "plot_excess", "excess-kl", MAP),
    ("known", "plot_rounds", "excess-kl", MAP),
    ("known", "plot_steps", "arithmetic-steps", MARK),
    ("known", "plot_reach", "arithmetic-steps", MARK),
    ("known", "plot_cuts", "arithmetic-edges", MARK),
    ("loops", "plot_lenses", "learned-lenses", MARK),
    ("mechanism", "plot_attribution", "logit-attribution", MAP),
    ("mechanism", "plot_patching", "attribution-patching", MAP),
    ("quality", "plot_solve_rate", "sudoku-solve-rate", MARK),
    ("quality", "plot_accuracy", "word-problems", MARK),
    ("quality", "plot_zero_shot", "zero-shot", MARK),
    ("quality", "plot_flops_ratio", "flops-to-target", MARK),
    ("quality", "plot_generative", "generative", MAP),
    ("representation", "plot_drift_null", "representation-change", MARK),
    ("representation", "plot_far_out", "far-out", MARK),
    ("representation", "plot_state_paths", "state-paths", {"facecolor": INK}),
    ("stopping", "plot_usage", "loops-used", MARK),
    ("stopping", "plot_savings", "sampling-savings", MARK),
]
"""File and name of a plot, a figure that shows it, and a look in place of the plot's own, colours first."""


class Caught(Exception):
    """The call that was waited for."""


def call_of(module: str, name: str, figure: str, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple, dict]:
    """Frame and options with which a figure calls a plot first."""
    found: list[tuple[tuple, dict]] = []

    def caught(*args, **options):
        found.append((args, options))
        raise Caught

    monkeypatch.setattr(f"loopmdm.analysis.plots.{module}.{name}", caught)
    exhibit = exhibits.FIGURES[figure]
    with style(), pytest.raises(Caught):
        exhibit.builder(exhibit.load())
    plt.close("all")
    return found[0]


def inks(artist) -> set[str]:
    """Colours and colour maps that an artist has."""
    if hasattr(artist, "get_cmap") and artist.get_array() is not None:
        return {artist.get_cmap().name}
    got = [getattr(artist, f"get_{name}")() for name in ("color", "facecolor") if hasattr(artist, f"get_{name}")]
    return {to_hex(ink) for each in got for ink in ([each] if isinstance(each, str) else np.atleast_2d(each))}


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_each_takes_axes_and_a_style(module, name):
    asked = inspect.signature(PUBLIC[module, name]).parameters
    styled = (
        {"ax", "axes"} & asked.keys() and "kws" in asked and asked["kws"].kind is inspect.Parameter.VAR_KEYWORD
    )
    assert bool(styled) is (name not in WHOLE)


@pytest.mark.parametrize(("module", "name", "figure", "look"), STYLED)
def test_a_style_replaces_that_of_the_data(module, name, figure, look, monkeypatch):
    args, options = call_of(module, name, figure, monkeypatch)
    drawn, panels = plt.subplots(1, 2)
    own = {"axes": panels} if "axes" in options else {"ax": panels[0]}
    given = PUBLIC[module, name](*args, **options | own | {"alpha": ALPHA} | look)
    assert given is next(iter(own.values()))
    wanted = next(iter(look.values()))
    for ax in np.atleast_1d(given):
        assert [a for a in ax.get_children() if a.get_alpha() == ALPHA and wanted in inks(a)]
    plt.close(drawn)
