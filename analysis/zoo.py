"""The runs by task, arm and seed: `sudoku-loop-seed3` is seed 3 of arm `loop` on `sudoku`.

Of some seeds only the record is kept: learning curve, and what was measured by number of loops.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loopmdm_model.checkpoints import RECORD, list_runs, resolve
from loopmdm_model.errors import UsageError
from loopmdm_model.evaluation import TestSet, load_test_set, task_of

if TYPE_CHECKING:
    from loopmdm_model.hooked import HookedLoopMDM  # loads TransformerLens, which drawing does not need

NAME = re.compile(r"(?P<task>[a-z0-9]+)-(?P<arm>[a-z0-9-]+?)(?:-seed(?P<seed>[0-9]+))?")


@dataclass(frozen=True, order=True)
class Shipped:
    """One run; `arm` is what is compared (base, loop, deep, ..), `seed` that of its training."""

    task: str
    arm: str
    seed: int
    name: str


def shipped(task: str | None = None, *arms: str) -> list[Shipped]:
    """The runs of a task and of some arms (default: all), by task, arm and seed."""
    found = []
    for name in list_runs():
        match = NAME.fullmatch(name)
        if match and task in (None, match["task"]) and (not arms or match["arm"] in arms):
            found.append(Shipped(match["task"], match["arm"], int(match["seed"] or 0), name))
    return sorted(found)


def names(task: str | None = None, *arms: str) -> tuple[str, ...]:
    """Names of `shipped`."""
    return tuple(model.name for model in shipped(task, *arms))


def s_max(name: str) -> int:
    """S_max of training of a looped model, or of the task's looped arm: the axis that its other arms share.

    While that arm is still to be shipped, what the roster says of it.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"{name} is no shipped model's name")
    looped = name if match["arm"].startswith("loop") else f"{match['task']}-loop"
    if looped not in list_runs():
        from analysis.roster import roster  # needs what trains

        for entry in roster():
            if entry.spec == looped:
                return entry.load().config.max_loops
    return record(looped)["spec"]["model"]["max_loops"]


def record(name: str) -> dict:
    """The model's train.json."""
    return json.loads((resolve(name) / RECORD).read_text())


def opened(name: str) -> tuple["HookedLoopMDM", TestSet]:
    """A shipped model, hooked, and its test set."""
    from loopmdm_model.hooked import HookedLoopMDM

    m = HookedLoopMDM.from_pretrained(name)
    return m, load_test_set(task_of(m.record), m.cfg.n_ctx, m.tokenizer)
