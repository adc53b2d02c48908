"""Which runs the study is made of: task, arm and seed of each, from figures/zoo.toml and the specs beside it.

`Zoo.roster()` is what the file says, `Zoo.shipped()` the part of it whose record is on disk now. Runs are chosen
by queries, values that are resolved against a zoo:

    (select(task="sudoku", arm="loop") | select(arm="base", seed=0)).of(Zoo.shipped())
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from loopmdm.model.errors import UsageError, check_count, check_keys, unknown_name
from loopmdm.model.files import read_json, read_toml
from loopmdm.model.network.checkpoints import RECORD, list_released, list_runs, need, resolve
from loopmdm.model.places import figures_folder
from loopmdm.model.training.spec import RunSpec

MAIN_TASKS = ("sudoku", "sotu")
"""The two tasks that are shown side by side: one whose answers can be checked, and text."""
LOOPED = "loop"
"""The arm whose S_max is the axis that all arms of its task share."""
KEYS = ("task", "arm", "spec", "seeds", "weights", "set")


# --- one run, and all of them ---


@dataclass(frozen=True, order=True)
class Run:
    """One training run: `arm` is what is compared on a `task` (base, loop, deep, ..), `seed` that of its training.

    `file` is the spec's, figures/specs/FILE.toml; `spec` is it as resolved with the seed and with `changes`, the
    keys that this run had otherwise. Without `weights` only the record is kept.
    """

    task: str
    arm: str
    seed: int
    file: str
    spec: RunSpec = field(compare=False, repr=False)
    weights: bool = True
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """What it is called in the zoo, in runs/ and in tables."""
        return self.spec.name

    @property
    def s_max(self) -> int:
        """Largest number of loops drawn in training; 1 if nothing loops."""
        return self.spec.config.max_loops

    @property
    def record(self) -> dict[str, Any]:
        """The train.json of the run that is shipped."""
        return read_json(need(resolve(self.name), RECORD))


@dataclass(frozen=True)
class Zoo:
    """Runs in the order of task, arm and seed; UsageError where they contradict each other.

    `listed` are all runs of the roster if these are a part of it: what is not shipped yet may set an axis.
    """

    runs: tuple[Run, ...]
    listed: tuple[Run, ...] = field(default=(), repr=False)

    def __post_init__(self):
        """Sorted, and without contradictions."""
        object.__setattr__(self, "runs", tuple(sorted(self.runs)))
        _check(self.runs)

    @classmethod
    def roster(cls, figures: Path | None = None) -> "Zoo":
        """Every run of zoo.toml in a figures folder; read once for each state of it and its specs."""
        return _read(*_state(figures))

    @classmethod
    def shipped(cls, figures: Path | None = None) -> "Zoo":
        """The runs of the roster whose record is here; `weights` says whether their weights are released."""
        return _shipped(*_state(figures), frozenset(list_runs()), frozenset(list_released()))

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, name: str) -> Run:
        """The run of a name; UsageError offers near ones."""
        found = {run.name: run for run in self}
        if name not in found:
            raise unknown_name("run", name, found, "Runs are listed in figures/zoo.toml.")
        return found[name]

    def select(self, **wanted: Any) -> tuple[Run, ...]:
        """`select(**wanted)` of these runs."""
        return select(**wanted).of(self)

    def first(self, task: str, arm: str = LOOPED) -> Run:
        """The run of a task's arm with the smallest seed; UsageError if there is none."""
        found = self.select(task=task, arm=arm)
        if not found:
            raise UsageError(
                f"no run of arm {arm} on task {task} is here; see figures/zoo.toml, train and ship one"
            )
        return found[0]

    def s_max(self, run: Run) -> int:
        """S_max of a looped run; of another one that of its task's arm `loop`, if there is one: the axis."""
        return run.s_max if run.s_max > 1 else self.axes([run]).get(run.task, run.s_max)

    def axes(self, runs: Iterable[Run]) -> dict[str, int]:
        """S_max of the arm `loop` of each task of some runs that has one."""
        known = {run.task: run.s_max for run in self.listed or self.runs if run.arm == LOOPED}
        return {task: known[task] for task in sorted({run.task for run in runs} & known.keys())}


def _check(runs: Iterable[Run]) -> None:
    """Each run once; each task of one corpus, and with one S_max of its looped arm."""
    for before, run in _alike(runs, lambda run: (run.task, run.arm, run.seed)):
        what = f"seed {run.seed} of arm {run.arm} on {run.task}"
        raise UsageError(f"{what} is listed twice, as {before.name} and {run.name}")
    for before, run in _alike(runs, lambda run: run.name):
        raise UsageError(f"{run.name} is listed twice, as {before.task} {before.arm} and {run.task} {run.arm}")
    for before, run in _alike(runs, lambda run: run.task):
        known, own = before.spec.data.corpus, run.spec.data.corpus
        if known != own:
            what = f"{run.name} is of {own}, but listed under task {run.task}"
            raise UsageError(f"{what}, which is {known} ({before.name}); give it another task")
    for before, run in _alike((run for run in runs if run.arm == LOOPED), lambda run: run.task):
        if before.s_max != run.s_max:
            what = f"{run.name} has S_max {run.s_max}, {before.name} {before.s_max}"
            raise UsageError(f"{what}; the arm {LOOPED} of a task has one: give it another arm")


def _alike(runs: Iterable[Run], key: Callable[[Run], Any]) -> Iterator[tuple[Run, Run]]:
    """Each run that has the key of one before it, after that one."""
    first: dict[Any, Run] = {}
    for run in runs:
        if first.setdefault(key(run), run) is not run:
            yield first[key(run)], run


# --- queries ---


@dataclass(frozen=True)
class Where:
    """Values that a run may have, field by field; none given: any. Not of the tasks `but_task`."""

    task: tuple[str, ...] = ()
    arm: tuple[str, ...] = ()
    seed: tuple[int, ...] = ()
    weights: bool | None = None
    but_task: tuple[str, ...] = ()

    def takes(self, run: Run) -> bool:
        """Whether a run is among those meant."""
        if self.weights not in (None, run.weights) or run.task in self.but_task:
            return False
        asked = ((self.task, run.task), (self.arm, run.arm), (self.seed, run.seed))
        return all(not values or value in values for values, value in asked)

    def __str__(self) -> str:
        given = [(item.name, getattr(self, item.name)) for item in fields(self)]
        told = [f"{name}={_shown(value)}" for name, value in given if value not in ((), None)]
        return f"select({', '.join(told)})"


def _shown(value: Any) -> str:
    return repr(value[0] if isinstance(value, tuple) and len(value) == 1 else value)


@dataclass(frozen=True)
class Select:
    """A query: the runs of its first part, then those of the next ones that are not there yet."""

    parts: tuple[Where, ...]

    def of(self, zoo: Zoo) -> tuple[Run, ...]:
        """The runs meant, part by part in the zoo's order."""
        return tuple(dict.fromkeys(run for part in self.parts for run in zoo if part.takes(run)))

    def __contains__(self, run: Run) -> bool:
        return any(part.takes(run) for part in self.parts)

    def names(self, zoo: Zoo) -> tuple[str, ...]:
        """Names of `of`."""
        return tuple(run.name for run in self.of(zoo))

    def __or__(self, other: "Select") -> "Select":
        return Select(self.parts + other.parts)

    def __repr__(self) -> str:
        return " | ".join(map(str, self.parts))


def select(
    task: str | Iterable[str] = (),
    arm: str | Iterable[str] = (),
    seed: int | Iterable[int] = (),
    weights: bool | None = None,
    but_task: str | Iterable[str] = (),
) -> Select:
    """The runs with these values of task, arm and seed (one or several each; default any).

    `weights`: only those with, or only those without.
    """
    return Select((Where(_several(task), _several(arm), _several(seed), weights, _several(but_task)),))


def _several(value: Any) -> tuple:
    return (value,) if isinstance(value, (str, int)) else tuple(value)


# --- reading the roster ---


def _state(figures: Path | None) -> tuple[Path, tuple]:
    """A figures folder, and what its roster and specs are now."""
    folder = figures_folder() if figures is None else figures
    paths = [folder / "zoo.toml", *sorted((folder / "specs").glob("*.toml"))]
    if not paths[0].is_file():
        raise UsageError(f"{paths[0]} is missing; restore it from the repository")
    states = [(path, path.stat()) for path in paths]
    return folder, tuple((path, state.st_mtime_ns, state.st_size) for path, state in states)


@lru_cache(maxsize=8)
def _shipped(figures: Path, state: tuple, records: frozenset[str], models: frozenset[str]) -> Zoo:
    listed = _read(figures, state).runs
    return Zoo(tuple(replace(run, weights=run.name in models) for run in listed if run.name in records), listed)


@lru_cache(maxsize=8)
def _read(figures: Path, state: tuple) -> Zoo:  # noqa: ARG001 - what the files are now
    path = figures / "zoo.toml"
    values = read_toml(path)
    check_keys(values, ("run",), path.name)
    listed = values.get("run", [])
    if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
        raise UsageError(f"{path}: runs are listed as [[run]], each with a task, an arm, a spec and its seeds")
    entries = [_checked(part, path.name) for part in listed]
    if not entries:
        raise UsageError(f"{path} lists no [[run]]; give each a task, an arm, a spec and its seeds")
    return Zoo(tuple(run for entry in entries for run in _runs(entry, figures / "specs")))


def _checked(part: dict[str, Any], origin: str) -> dict[str, Any]:
    """One [[run]] with `weights` and `set`; UsageError names what is wrong in it."""
    what = f"{origin} [[run]] {part.get('spec', '?')}"
    check_keys(part, KEYS, what)
    entry = {"weights": part.get("seeds"), "set": {}} | part
    for name, example in (("task", "sudoku"), ("arm", "loop")):
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(entry.get(name, ""))):
            raise UsageError(f'{what}: needs {name} = a word, such as "{example}"; got {entry.get(name)!r}')
    seeds, weights, changes = (entry.get(name) for name in ("seeds", "weights", "set"))
    if not isinstance(entry.get("spec"), str) or not seeds or not isinstance(seeds, list):
        raise UsageError(f"{what}: needs spec = NAME and seeds = [0, 1, ..]")
    for seed in seeds:
        check_count(f"{what} seeds", seed, least=0)
    if not isinstance(weights, list) or not all(seed in seeds for seed in weights):
        raise UsageError(f"{what}: weights must be a list of seeds; {weights} are not all among seeds {seeds}")
    if not isinstance(changes, dict) or any(isinstance(value, dict) for value in changes.values()):
        raise UsageError(f'{what}: set takes quoted keys, such as set = {{ "training.learning_rate" = 5e-4 }}')
    return entry


def _runs(entry: dict[str, Any], specs: Path) -> Iterator[Run]:
    """A run for each seed, as `loopmdm train SPEC --seed SEED --set ..` resolves it."""
    spec = RunSpec.load(specs / f"{entry['spec']}.toml", entry["set"])
    for seed in entry["seeds"]:
        weights, changes = seed in entry["weights"], tuple(entry["set"].items())
        yield Run(entry["task"], entry["arm"], seed, entry["spec"], spec.seeded(seed), weights, changes)
