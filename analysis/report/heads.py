"""Head cards of the report: where each looped head looks and what it does, loop by loop, as curves and numbers.

Cards of the report's models come from the committed table `head-cards`; of another model they are measured now.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.measures.attention.cards import check_heads, label_rates, of_case
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.options import OnTests
from loopmdm.analysis.numbers.estimate import with_interval
from loopmdm.analysis.plots.cards import RELATION_STYLE
from loopmdm.analysis.plots.style import CLEAN, MASKED
from loopmdm.analysis.report.curves import Curves, Line
from loopmdm.model.errors import UsageError
from loopmdm.model.zoo.runs import MAIN_TASKS, Zoo

EFFECTS = (
    ("now", "clean", "after this loop, of clean keys", CLEAN, "-"),
    ("now", "masked", "after this loop, of masked keys", MASKED, "-."),
    ("removed", "clean", "after the last loop, of clean keys", "#fdb863", "--"),
    ("removed", "masked", "after the last loop, of masked keys", "#6baed6", ":"),
)
"""Read, kind of key, how it is called, and its look."""
TITLES = {"attention": "attention:", "lift": "lift:", "sink": "attention: sinks", "entropy": "entropy (nats)",
          "erasure": "erasure", "direct": "direct:", "gradient": "gradient:", "now": "now:",
          "removed": "removed:"}  # fmt: skip
SEQUENCES, EFFECT_SEQUENCES = 64, 24
"""Of a model that is measured for its own report."""


@dataclass(frozen=True)
class Card:
    """One head: its labels and effects by loop, two curves, and rows of numbers (name, cells)."""

    name: str
    title: str
    loops: list[int]
    labels: list[str]
    effects: list[str]
    attention: Curves
    changes: Curves
    rows: list[tuple[str, list[str]]]
    n: int
    n_effects: int


@dataclass(frozen=True)
class Cards:
    """The cards of a model, what the rules find in its untrained twin, or why there are none."""

    model: str
    cards: list[Card]
    null: str = ""
    why: str = ""


def shown_cards() -> list[Cards]:
    """Of the first looped model of each main task, from the committed table."""
    frame, zoo = tables.load("head-cards"), Zoo.shipped()
    names = [zoo.first(task).name for task in reversed(MAIN_TASKS)]
    return [cards_of(name, frame[frame["model"] == name]) for name in names]


def measured_cards(case: Case) -> Cards:
    """Of any model, measured on its test set; with the reason where cards are not defined for it."""
    name = case.m.model_name
    case = replace(case, options=OnTests(case.n_loops, SEQUENCES, case.seed))
    try:
        check_heads(case.m)
        return cards_of(name, of_case(case, n_sequences=SEQUENCES, n_effects=EFFECT_SEQUENCES))
    except UsageError as error:
        return Cards(name, [], why=str(error))


def cards_of(model: str, frame: pd.DataFrame) -> Cards:
    """Cards from rows of `head_cards` with `weights`, at one mask ratio."""
    if frame.empty:
        return Cards(model, [], why=f"the table head-cards has no rows of {model}; run `loopmdm table head-cards`")
    own = with_interval(frame[frame["weights"] == "trained"], "value", "standard_error")
    heads = own.groupby(["layer", "head"], sort=True)
    cards = [_card(model, int(layer), int(head), part) for (layer, head), part in heads]  # pyright: ignore
    return Cards(model, cards, _null(frame[frame["weights"] != "trained"]))


def _card(model: str, layer: int, head: int, rows: pd.DataFrame) -> Card:
    each = rows.drop_duplicates("loop").sort_values("loop")
    loops = [int(loop) for loop in each["loop"]]
    title = f"layer {layer}, head {head}"
    attention = [
        _line(rows, loops, ("attention", name), name, look["color"], look["linestyle"])
        for name, look in RELATION_STYLE.items()
    ]
    changes = [_line(rows, loops, (read, of), *look) for read, of, *look in EFFECTS]
    return Card(
        f"{model}-head-{layer}-{head}",
        title,
        loops,
        each["label"].tolist(),
        each["effect"].tolist(),
        Curves(f"{model}, {title}: share of attention by relation, by loop", loops, _known(attention), 0.0, 1.0),
        Curves(f"{model}, {title}: what it adds to the logit of what keys hold, by loop", loops, _known(changes)),
        _numbers(rows, loops),
        int(rows.loc[rows["metric"] == "attention", "n"].max()),
        int(rows.loc[rows["metric"] == "now", "n"].max()),
    )


def _line(rows: pd.DataFrame, loops: list[int], what: tuple[str, str], name: str, color: str, style: str) -> Line:
    part = rows[(rows["metric"] == what[0]) & (rows["of"] == what[1])].set_index("loop").reindex(loops)
    values, low, high = (part[column].astype(float).tolist() for column in ("value", "low", "high"))
    return Line(name, values, low, high, color, style)


def _known(lines: list[Line]) -> list[Line]:
    return [line for line in lines if np.isfinite(line.values).any()]


def _numbers(rows: pd.DataFrame, loops: list[int]) -> list[tuple[str, list[str]]]:
    """Value and standard error of every metric by loop."""
    found = []
    for (metric, of), part in rows.groupby(["metric", "of"], sort=False):
        part = part.set_index("loop").reindex(loops)
        pairs = zip(part["value"], part["standard_error"], strict=True)
        cells = [
            "–" if pd.isna(value) else f"{value:.3g} ± {error:.1g}".replace("-", "−") for value, error in pairs
        ]
        found.append((f"{TITLES.get(str(metric), str(metric))} {of}".strip(), cells))
    return found


def _null(rows: pd.DataFrame) -> str:
    """What the rules say of heads that learned nothing."""
    if rows.empty:
        return ""
    rates = label_rates(rows)
    told = []
    for what in ("label", "effect"):
        part = rates[rates["what"] == what]
        told.append(
            ", ".join(f"{name} {share:.0%}" for name, share in zip(part["name"], part["share"], strict=True))
        )
    return f"labels {told[0]}; effects {told[1]} (n = {int(rates['n'].iloc[0])} heads at loops)"
