"""Feature pages of the report: the strongest features of each shipped dictionary, measured when it is written.

When a feature is active, what it follows, where it is largest, what it does to the answers (`pages`), beside what
the dictionary's record says of the whole (`making`).
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.mechanism.dictionaries.coder import Dictionary, list_dictionaries
from loopmdm.analysis.measures.mechanism.dictionaries.making import command
from loopmdm.analysis.measures.mechanism.dictionaries.pages import FeaturePage, Word, around, feature_pages
from loopmdm.analysis.measures.mechanism.dictionaries.report import MATCHED, Reading
from loopmdm.analysis.report.curves import Curves, Line
from loopmdm.model.errors import UsageError
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.sudoku import Board, board_of_model

FEATURES, EXAMPLES, SEQUENCES = 24, 8, 256
DRAWN = 5
"""Examples that are drawn of those that the effects are of."""
ROWS = (("explained_variance", "variance explained"), ("kl_recovered", "KL recovered"),
        ("loss_recovered", "loss recovered"), ("l0", "active features a position"),
        ("born", "features that begin here"), ("last", "features that end here"),
        ("matched", "follow a known variable"), ("matched_shuffled", "the same, shuffled"))  # fmt: skip
"""Metrics of a record that are shown by loop, and what they are called."""


@dataclass(frozen=True)
class Example:
    """Where a feature is large: rows of words around it, or of a board's cells, and its code there."""

    code: float
    rows: list[list[Word]]


@dataclass(frozen=True)
class Feature:
    """One page, ready to be shown."""

    name: str
    page: FeaturePage
    says: str
    curve: Curves
    examples: list[Example]


@dataclass(frozen=True)
class Pages:
    """A dictionary's features: `facts` (name, text), `scores` (name, arm, cells by loop), or `why` there are none.

    `board` is "2x3" for boxes of two rows and three columns, "" for text.
    """

    model: str
    title: str = ""
    facts: list[tuple[str, str]] | None = None
    loops: list[int] | None = None
    scores: list[tuple[str, str, list[str]]] | None = None
    features: list[Feature] | None = None
    board: str = ""
    why: str = ""


def shipped_pages() -> list[Pages]:
    """Of every shipped dictionary; with the reason where it cannot be read with its model."""
    return [pages_of(name) for name in list_dictionaries()]


def pages_of(name: str) -> Pages:
    """Pages of a shipped dictionary on its model's test sequences."""
    case = Case.of(name, n=SEQUENCES)
    try:
        dictionary = Dictionary.from_pretrained(name, case.m)
    except UsageError as error:
        return Pages(name, why=str(error))
    b, board = Reading(case, n_scored=SEQUENCES).scored(), board_of_model(case.m.cfg)
    found = feature_pages(dictionary, case.m, b, FEATURES, EXAMPLES)
    told = dictionary.origin.told
    return Pages(
        name,
        repr(dictionary),
        _facts(dictionary),
        [loop for loop in dictionary.origin.loops if loop is not None],
        _scores(told.get("scores", {}), len(dictionary.origin.sites)),
        [_feature(name, page, case, b, board) for page in found],
        "" if board is None else f"{board.box_rows}x{board.box_columns}",
    )


def _feature(name: str, page: FeaturePage, case: Case, b: MaskedBatch, board: Board | None) -> Feature:
    loops = [int(loop) for loop in page.profile["loop"]]
    line = Line("share of positions", page.profile["active"].astype(float).tolist())
    says = f"feature {page.feature}: share of hidden positions where it is active, by loop"
    examples = []
    for row in page.examples.head(DRAWN).itertuples():
        words = around(case.m, b, row.sample, row.position) if board is None else _cells(b, row, board)
        rows = (
            [words] if board is None else [words[at : at + board.size] for at in range(0, len(words), board.size)]
        )
        examples.append(Example(float(row.code), rows))
    return Feature(f"{name}-feature-{page.feature}", page, _says(page), Curves(says, loops, [line], 0.0), examples)


def _cells(b: MaskedBatch, row: Any, board: Board) -> list[Word]:
    """Every cell: its symbol, whether it is hidden, whether it is the one meant."""
    clean, hidden = b.clean[row.sample].tolist(), b.masked[row.sample].tolist()
    assert len(clean) == board.n_cells
    return [
        (str(symbol + 1), gone, at == row.position)
        for at, (symbol, gone) in enumerate(zip(clean, hidden, strict=True))
    ]


def _says(page: FeaturePage) -> str:
    """When it lives, and what it follows best."""
    lives = page.profile[page.profile["profile"] > 0.5]["loop"]
    first, last = int(lives.min()), int(lives.max())
    when = f"loop {first}" if first == last else f"loops {first} to {last}"
    follows = page.follows.head(1)
    told = [
        f"{'follows' if row.auc >= MATCHED else 'nearest to'} {row.variable} (AUC {row.auc:.2f})"
        for row in follows.itertuples()
    ]
    what = "".join(told) or "follows nothing known"
    return f"{what}; {when}; active at {page.frequency:.1%}"


def _facts(dictionary: Dictionary) -> list[tuple[str, str]]:
    told, shape, origin = dictionary.origin.told, dictionary.shape, dictionary.origin
    data, training = told.get("data", {}), told.get("training", {})
    trained, scored = data.get("trained_on", {}), data.get("scored_on", {})
    dead = {arm: scores["dead"]["value"] for arm, scores in told.get("scores", {}).items()}
    ratios = ", ".join(map(str, trained.get("mask_ratios", []))) or "nothing"
    rows = f"{told.get('n_rows', 0):,} positions of {trained.get('n')} {trained.get('split')} sequences"
    steps = f"{training.get('steps')} steps of {training.get('batch_size')}, seed {training.get('seed')}"
    sites = f"{origin.sites[0]} to {origin.sites[-1]}"
    return [
        ("model", f"{origin.model.name}, weights and config {origin.model.hash}"),
        ("states", f"{sites} at {origin.positions} positions, layer {told.get('layer')}"),
        ("kind", f"{shape.kind}, {shape.n_features} features, {shape.activation}, {shape.k} active a position"),
        ("trained on", f"{rows}, masked {ratios}; {steps}"),
        ("scored on", f"n = {scored.get('n')} {scored.get('split')} sequences, half masked"),
        ("made by", command(dictionary)),
        ("dead features", ", ".join(f"{share:.0%} ({arm} model)" for arm, share in dead.items())),
    ]


def _scores(scores: dict[str, Any], n_sites: int) -> list[tuple[str, str, list[str]]]:
    """Rows of the record that are known by loop; what is one number for all loops is in its first cell."""
    found = []
    for metric, name in ROWS:
        for arm, own in scores.items():
            if metric not in own:
                continue
            values, errors = (_listed(own[metric][key]) for key in ("value", "standard_error"))
            cells = [_cell(value, error) for value, error in zip(values, errors, strict=True)]
            found.append((name, arm, cells + [""] * (n_sites - len(cells))))
    return found


def _listed(value: Any) -> list[float | None]:
    return value if isinstance(value, list) else [value]


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if error is None or pd.isna(error) else f" ± {error:.1g}")
