"""Sets of runs that were declared in `figures/claims.toml` before their results, and what decides between arms.

A set is read once all of its runs are in the zoo. It then answers the claims that it names on its task; what was
known when an estimand was written stays exploratory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from loopmdm.model.errors import UsageError, check_keys
from loopmdm.model.files import read_toml
from loopmdm.model.places import figures_folder
from loopmdm.model.zoo.runs import Run, Zoo

SETS = {"sudoku": "sudoku-s4", "arithmetic": "arithmetic-depth"}
"""The set that decides between looped, base and deep models of a task."""
CLOSED = {"sudoku": "sudoku-relays-closed"}
"""The set whose masked keys nobody else sees: with the runs of the same seeds in `SETS`, a 2 x 2."""
ROLES = ("loop", "base", "deep")


@dataclass(frozen=True)
class Declared:
    """One entry: `runs` are seeds by spec."""

    name: str
    runs: Mapping[str, tuple[int, ...]]
    claims: tuple[str, ...]
    estimand: str
    gate: str
    falsifier: str

    def of(self, zoo: Zoo) -> tuple[Run, ...]:
        """Its runs in a zoo."""
        return tuple(run for run in zoo if run.seed in self.runs.get(run.file, ()))

    def whole(self, zoo: Zoo) -> bool:
        """Whether all of them are there."""
        return len(self.of(zoo)) == sum(map(len, self.runs.values()))


def load_declared(path: Path | None = None) -> dict[str, Declared]:
    """All sets by name; UsageError names a missing or unknown key."""
    path = path or figures_folder() / "claims.toml"
    state = path.stat() if path.is_file() else None
    return dict(_read(path, state and (state.st_mtime_ns, state.st_size)))


@lru_cache(maxsize=8)
def _read(path: Path, state: tuple[int, int] | None) -> dict[str, Declared]:  # noqa: ARG001 - what the file is now
    names, found = [item.name for item in fields(Declared)], {}
    for entry in read_toml(path).get("declared", []):
        what = f"{path.name} [[declared]] {entry.get('name', '?')}"
        check_keys(entry, names, what)
        missing = next((name for name in names if name not in entry), None)
        if missing:
            raise UsageError(f"{what}: missing key {missing!r}")
        found[entry["name"]] = Declared(**entry | {"claims": tuple(entry["claims"])})
    return found


def deciding(task: str, zoo: Zoo | None = None) -> dict[str, tuple[Run, ...]]:
    """Looped, base and deep runs that decide between these arms: a whole declared set, else every seed."""
    zoo = Zoo.shipped() if zoo is None else zoo
    declared = load_declared().get(SETS.get(task, ""))
    if declared is None or not declared.whole(zoo):
        return {role: zoo.select(task=task, arm=role) for role in ROLES}
    runs = declared.of(zoo)
    return {role: tuple(run for run in runs if run.arm.partition("-")[0] == role) for role in ROLES}


def two_by_two(task: str, zoo: Zoo | None = None) -> dict[str, tuple[Run, ...]] | None:
    """Runs with and without looping, with masked keys seen and hidden ("-closed"), of the same seeds.

    None until the declared sets are whole.
    """
    zoo = Zoo.shipped() if zoo is None else zoo
    sets = load_declared()
    seen, closed = (sets.get(names.get(task, "")) for names in (SETS, CLOSED))
    if seen is None or closed is None or not (seen.whole(zoo) and closed.whole(zoo)):
        return None
    seeds = {run.seed for run in closed.of(zoo)}
    runs = [run for run in (*seen.of(zoo), *closed.of(zoo)) if run.seed in seeds]
    arms = dict.fromkeys(run.arm for run in runs if run.arm != "deep")
    ordered = sorted(arms, key=lambda arm: (arm.endswith("-closed"), not arm.startswith("loop")))
    return {arm: tuple(run for run in runs if run.arm == arm) for arm in ordered}


def is_confirmed(task: str, claim: str) -> bool:
    """Whether a claim is answered on a task by runs that were declared before their results."""
    zoo = Zoo.shipped()
    sets = (declared for declared in load_declared().values() if claim in declared.claims and declared.whole(zoo))
    return any(run.task == task for declared in sets for run in declared.of(zoo))
