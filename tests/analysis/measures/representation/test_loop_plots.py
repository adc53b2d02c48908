"""Plots of lenses and gains draw what the frames hold, and say what they lack."""

import matplotlib.pyplot as plt
import pytest

from loopmdm.analysis.measures.representation.gain import Push, perturbation_gain
from loopmdm.analysis.measures.representation.lens_comparison import compare_lenses
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.plots.loops import plot_gain, plot_growth, plot_lenses


@pytest.fixture(autouse=True)
def axes():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_a_line_a_lens(hooked, batch, axes):
    frame = with_interval(compare_lenses(hooked, batch, {}, 3), "value", "standard_error")
    drawn = {line.get_label(): line.get_ydata() for line in plot_lenses(frame, ax=axes).lines}
    assert set(drawn) == {"coda", "direct"}
    own = frame[(frame["metric"] == "kl_final") & (frame["lens"] == "direct")].sort_values("loop")
    assert drawn["direct"].tolist() == own["value"].tolist()
    with pytest.raises(ValueError, match="plot_lenses: the frame has no column 'lens'"):
        plot_lenses(frame.drop(columns="lens"), ax=axes)


def test_a_line_a_distance(hooked, batch, axes):
    frame = perturbation_gain(hooked, batch, 3, Push(directions=("random",), sizes=(0.0,)))
    frame = with_interval(
        frame[(frame["source"] == "clean") & (frame["receiver"] == "any")], "value", "standard_error"
    )
    drawn = [line.get_label() for line in plot_gain(frame[frame["metric"] == "gain"], ax=axes).lines]
    assert drawn == [f"|i - j| = {name}" for name in ("1", "2-3", "4-7", "8-9")]
    assert axes.get_yscale() == "log"
    _, ax = plt.subplots()
    lines = plot_growth(frame[frame["metric"] == "growth"], ax=ax).lines
    assert [line.get_label() for line in lines[:2]] == ["total", "own"]
    plt.close(ax.figure)
