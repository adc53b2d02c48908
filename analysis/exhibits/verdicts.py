"""The paper's claims, each put to a measurement that could have said no.

`figures/claims.toml` holds every claim's estimand, margin, direction and falsifier, from before the five-seed
Sudoku runs (`seen` says what was known by then); here is how the estimand is read off the tables. The interval
is over training seeds (Student's t, Welch's for two arms) wherever there are two or more, else over test items.
Verdict: "supported" if the whole interval lies beyond the margin in the claimed direction, "not supported" if
it lies on the other side, "undecided" otherwise, "not run" where the models are not there.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from loopmdm.analysis.exhibits.answers import Answer, NotRun
from loopmdm.analysis.exhibits.registry import EXHIBITS, Reading
from loopmdm.model.errors import UsageError, check_keys
from loopmdm.model.files import read_toml
from loopmdm.model.zoo.runs import MAIN_TASKS, figures_folder

FIELDS = ("name", "tasks", "claim", "where", "estimand", "margin", "direction", "falsifier", "figure", "seen")
COLUMNS = ["claim", "task", "verdict", "estimate", "low", "high", "margin", "direction", "n_seeds", "n", "figure",
           "text"]  # fmt: skip

GROUPS = (("Sudoku", MAIN_TASKS[:1]), ("text, or what is named", (*MAIN_TASKS[1:], "tree", "gsm")))
"""Columns in which verdicts are shown: title and tasks, the main one first."""


@dataclass(frozen=True)
class Claim:
    """One entry of `figures/claims.toml`."""

    name: str
    tasks: tuple[str, ...]
    claim: str
    where: str
    estimand: str
    margin: float
    direction: str
    falsifier: str
    figure: str
    seen: str

    @property
    def reading(self) -> Reading:
        """How it is answered, beside its figure; UsageError where nothing there says so."""
        for reading in EXHIBITS[self.figure].answers:
            if reading.claim == self.name:
                return reading
        raise UsageError(f"claims.toml [{self.name}]: the figure {self.figure} has no answer to it")


def load_claims(path: Path | None = None) -> list[Claim]:
    """All claims in the order of the file; UsageError names a missing or unknown key."""
    path = path or figures_folder() / "claims.toml"
    if not path.is_file():
        raise UsageError(f"{path} is missing; restore it from the repository")
    claims = []
    for entry in read_toml(path)["claim"]:
        check_keys(entry, FIELDS, f"{path.name} [{entry.get('name', '?')}]")
        missing = [field for field in FIELDS if field not in entry]
        if missing or entry["direction"] not in ("above", "below"):
            what = f"missing key {missing[0]!r}" if missing else 'direction must be "above" or "below"'
            raise UsageError(f"{path.name} [{entry.get('name', '?')}]: {what}")
        claims.append(Claim(**entry | {"tasks": tuple(entry["tasks"]), "margin": float(entry["margin"])}))
    return claims


def verdict(answer: Answer, margin: float, direction: str) -> str:
    """By where the interval lies; an estimate without an interval decides nothing."""
    if not (np.isfinite(answer.low) and np.isfinite(answer.high)):
        return "undecided"
    beyond, short = answer.low > margin, answer.high < margin
    if direction == "below":
        beyond, short = short, beyond
    return "supported" if beyond else "not supported" if short else "undecided"


def claims_table() -> pd.DataFrame:
    """Every claim by task.

    Columns: claim task verdict estimate low high margin direction n_seeds n figure text.
    """
    rows = []
    for claim in load_claims():
        for task in claim.tasks:
            try:
                found = claim.reading.answer(task)
                says = found.verdict or verdict(found, claim.margin, claim.direction)
            except NotRun:
                found, says = Answer(float("nan"), float("nan"), float("nan"), 0, 0), "not run"
            rows.append((claim.name, task, says, found.estimate, found.low, found.high, claim.margin,
                         claim.direction, found.n_seeds, found.n, claim.figure, claim.claim))  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)
