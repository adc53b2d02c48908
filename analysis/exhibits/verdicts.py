"""The paper's claims, each put to a measurement that could have said no.

`figures/claims.toml` holds every claim's estimand with its unit and test, margin and its reason, gate, direction
and falsifier; `seen` says what was known when they were written. How the estimand is read off the tables stands
beside the figure that shows it. Verdicts:

    supported            the whole 95% interval lies beyond the margin in the claimed direction
    not supported        it lies on the other side
    equivalent           neither, and the whole interval lies within `slack` of the margin (two one-sided tests at
                         2.5% each)
    undecided            none of these; `decides` says what would decide it and what that costs
    not testable here    the gate failed: a positive control without which the answer would say nothing
    not run              the models are not there

Holm's p is that of all cells with a test taken together.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.answers import Answer, Gate, NotRun
from loopmdm.analysis.exhibits.declared import is_confirmed
from loopmdm.analysis.exhibits.registry import EXHIBITS, Reading
from loopmdm.analysis.numbers.contrasts import holm
from loopmdm.model.errors import UsageError, check_keys
from loopmdm.model.files import read_toml
from loopmdm.model.places import figures_folder

COLUMNS = ["claim", "task", "verdict", "estimate", "low", "high", "unit", "margin", "direction", "p", "p_holm",
           "n_seeds", "n_against", "n", "figure", "why", "text"]  # fmt: skip
UNTESTABLE, NOT_RUN, UNDECIDED = "not testable here", "not run", "undecided"
VERDICTS = ("supported", "not supported", "equivalent", UNDECIDED, UNTESTABLE, NOT_RUN)


@dataclass(frozen=True)
class Claim:
    """One entry of `figures/claims.toml`; `slack` and `decides` are by task."""

    name: str
    tasks: tuple[str, ...]
    claim: str
    where: str
    unit: str
    estimand: str
    test: str
    gate: str
    margin: float
    because: str
    direction: str
    falsifier: str
    figure: str
    seen: str
    slack: Mapping[str, float] = field(default_factory=dict)
    decides: Mapping[str, str] = field(default_factory=dict)

    @property
    def reading(self) -> Reading:
        """How it is answered, beside its figure; UsageError where nothing there says so."""
        for reading in EXHIBITS[self.figure].answers:
            if reading.claim == self.name:
                return reading
        raise UsageError(f"claims.toml [{self.name}]: the figure {self.figure} has no answer to it")


FIELDS = tuple(item.name for item in fields(Claim))
NEEDED = tuple(item.name for item in fields(Claim) if item.default_factory is MISSING)


def load_claims(path: Path | None = None) -> list[Claim]:
    """All claims in the order of the file; UsageError names a missing or unknown key."""
    path = path or figures_folder() / "claims.toml"
    if not path.is_file():
        raise UsageError(f"{path} is missing; restore it from the repository")
    claims = []
    for entry in read_toml(path)["claim"]:
        check_keys(entry, FIELDS, f"{path.name} [{entry.get('name', '?')}]")
        missing = [name for name in NEEDED if name not in entry]
        if missing or entry["direction"] not in ("above", "below"):
            what = f"missing key {missing[0]!r}" if missing else 'direction must be "above" or "below"'
            raise UsageError(f"{path.name} [{entry.get('name', '?')}]: {what}")
        claims.append(Claim(**entry | {"tasks": tuple(entry["tasks"]), "margin": float(entry["margin"])}))
    return claims


def verdict(answer: Answer, margin: float, direction: str, slack: float = 0.0) -> str:
    """By where the interval lies; an estimate without an interval decides nothing."""
    if not (np.isfinite(answer.low) and np.isfinite(answer.high)):
        return UNDECIDED
    beyond, short = answer.low > margin, answer.high < margin
    if direction == "below":
        beyond, short = short, beyond
    if beyond or short:
        return "supported" if beyond else "not supported"
    within = margin - slack < answer.low and answer.high < margin + slack
    return "equivalent" if within else UNDECIDED


def claims_table() -> pd.DataFrame:
    """Every claim by task.

    Columns: claim task verdict estimate low high unit margin direction p p_holm n_seeds n_against n figure why
    text. `why` is what the gate or the comparison gave, or what would decide what is undecided.
    """
    with tables.read_once():
        rows = [_row(claim, task) for claim in load_claims() for task in claim.tasks]
    df = pd.DataFrame(rows)
    tested = df["p"].where(~df["verdict"].isin([UNTESTABLE, NOT_RUN]))
    return df.assign(p_holm=holm(tested.to_numpy(dtype=float)))[COLUMNS]


def _row(claim: Claim, task: str) -> dict[str, object]:
    nothing = Answer(float("nan"), float("nan"), float("nan"), 0, 0)
    gate = Gate(True, "")
    try:
        gate = claim.reading.gate(task) if claim.reading.gate else gate
        found = claim.reading.answer(task) if claim.reading.answer else nothing
        says = verdict(found, claim.margin, claim.direction, claim.slack.get(task, 0.0))
    except NotRun:
        found, says = replace(nothing, note="the runs that answer it are not here"), NOT_RUN
    if not gate.passed:
        says = UNTESTABLE
    runs = "declared runs" if is_confirmed(task, claim.name) else ""
    open_ = says in (UNDECIDED, UNTESTABLE) and task in claim.decides
    ahead = f"what would decide it: {claim.decides[task]}" if open_ else ""
    return {
        "claim": claim.name, "task": task, "verdict": says,
        "estimate": found.estimate, "low": found.low, "high": found.high, "unit": claim.unit,
        "margin": claim.margin, "direction": claim.direction, "p": found.p(claim.margin),
        "n_seeds": found.n_seeds, "n_against": found.n_against, "n": found.n, "figure": claim.figure,
        "why": "; ".join(filter(None, (runs, gate.said, found.note, ahead))), "text": claim.claim,
    }  # fmt: skip
