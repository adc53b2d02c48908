"""Plots of edges and scrubbing show the frame's numbers."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.plots.edges import plot_edge_effects, plot_relays, plot_scrubbing


def framed(rows: list[dict], value: str, error: str) -> pd.DataFrame:
    return with_interval(pd.DataFrame(rows).assign(n_units=30), value, error)


def test_a_cell_a_number_and_brackets_where_the_interval_holds_zero():
    rows = [
        {
            "loop": loop,
            "relation": name,
            "keys": "clean",
            "queries": "masked",
            "value": value,
            "standard_error": se,
        }
        for loop in range(2)
        for name, value, se in (("box", 0.02, 0.001), ("none", 0.001, 0.001))
    ]
    _, ax = plt.subplots()
    plot_edge_effects(framed(rows, "value", "standard_error"), ax=ax)
    assert [text.get_text() for text in ax.texts] == ["20", "20", "(1.0)", "(1.0)"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["box c→m", "none c→m"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"]
    plt.close("all")


def test_relays_are_bars_and_classes_lines():
    rows = [
        {"relay": relay, "relation": name, "value": value, "standard_error": 0.001}
        for relay, value in (("masked", 0.02), ("clean", 0.01))
        for name in ("box", "any")
    ]
    _, (one, two) = plt.subplots(1, 2)
    plot_relays(framed(rows, "value", "standard_error"), ax=one)
    assert [round(bar.get_height()) for bar in one.patches] == [20, 20, 10, 10]
    rows = [
        {"arm": arm, "round": number, "kl": number + cost, "kl_se": 0.1}
        for arm, cost in (("candidates", 0.0), ("truth", 0.5), ("number", 1.0), ("any", 2.0))
        for number in (0, 1)
    ]
    plot_scrubbing(framed(rows, "kl", "kl_se"), ax=two)
    lines = [list(line.get_ydata()) for line in two.lines if len(line.get_ydata()) == 2]
    assert [0.0, 1.0] in lines and [2.0, 3.0] in lines
    with pytest.raises(ValueError, match="plot_scrubbing: the frame has no column 'arm'"):
        plot_scrubbing(pd.DataFrame({"round": [1]}))
    plt.close("all")
