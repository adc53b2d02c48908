"""Every measure on a shipped model with options that make it a matter of seconds."""

from typing import Any

from loopmdm.analysis.measures import MEASURES

SMALL = {
    "n_loops": 3, "n": 12, "mask_ratios": (0.5,), "n_samples": 1, "n_sequences": 6, "n_draws": 2,
    "n_resamples": 20, "n_thresholds": 4, "n_boards": 12, "n_features": 32, "n_scored": 4, "n_exact": 2,
    "n_effects": 4, "n_fit": 40, "n_jacobian": 2, "n_rows": 200, "least_loops": 3,
}  # fmt: skip
"""Options that make any measure a matter of seconds."""
OF = {"tree": "tree-loop", "Sudoku": "sudoku-loop-s4", "excess-kl": "markov-loop", "training-free": "sudoku-base"}
FETCHED = ("zero-shot", "generative", "multiple-choice", "word-problems")
"""They read what is fetched first."""
STEPS = {"dictionaries": {"steps": 20}, "lenses": {"steps": 20}}


def small(name: str) -> tuple[str, dict[str, Any]]:
    """A model that the measure is of, and options that keep it small."""
    item = MEASURES[name]
    usual = item.options().asked()
    options = {key: value for key, value in SMALL.items() if key in usual} | STEPS.get(name, {})
    if item.on == "loops":
        options["n_loops"] = [1, 3]
    return OF.get(name) or OF.get(item.on, "sudoku-loop-s4"), options


def measures() -> list[str]:
    """Names of all that need nothing fetched."""
    return [name for name in MEASURES if name not in FETCHED]
