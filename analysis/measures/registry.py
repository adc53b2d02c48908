"""The registry of measures: what can be asked of a model, from notebook, command line and tables alike.

A measure is a function of a `Case` (a model and its test set) that gives a tidy frame, in one of three forms:

    run(case, b, **own)         on "masks": a masked batch at each mask ratio, or along the model's own samples
    run(case, **own)            on "test set", or on the task it needs: it draws its own masks
    run(case, counts, **own)    on "loops": what the model can do at each loop count

To add one: a file below this folder with the function and `MEASURES = (Measure(...),)`; from another package, an
entry point of the group "loopmdm.measures" that names a `Measure` or a list of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import pandas as pd

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.options import ByLoops, OnMasks, OnTests, Options, options_of
from loopmdm.analysis.numbers.editions import Edition
from loopmdm.model.errors import UsageError
from loopmdm.model.registry import Registry
from loopmdm.model.sequences import MaskedBatch
from loopmdm.model.tasks.sudoku import BOARDS
from loopmdm.model.tasks.trees import TREE_TASKS

Run = Callable[..., pd.DataFrame]
ANSWERED = {"Sudoku": BOARDS, "tree": TREE_TASKS}
FORMS: dict[str, tuple[type[Options], int]] = {"masks": (OnMasks, 2), "loops": (ByLoops, 2)}
"""What is said of reading, and how many parameters come before the measure's own, by what it looks at."""


@dataclass(frozen=True)
class Measure(Edition):
    """`run`, of the form that `on` says; its keyword parameters are the measure's own options.

    `samples`: its errors are over samples that the model draws, not over test sequences. `needs`: facts that a
    model must have (`layout.NEEDS`). `loops`: the fewest that it can compare.
    """

    name: str
    what: str
    run: Run
    on: str = "masks"
    samples: bool = False
    needs: tuple[str, ...] = ("masks", "bidirectional")
    loops: int = 1

    @cached_property
    def options(self) -> type[Options]:
        """What it can be asked, a frozen dataclass."""
        base, skip = FORMS.get(self.on, (OnTests, 1))
        return options_of(self.name, base, self.run, skip)

    @cached_property
    def own(self) -> tuple[str, ...]:
        """Names of the options that are its own."""
        base, _ = FORMS.get(self.on, (OnTests, 1))
        shared = {item.name for item in fields(base)}
        return tuple(item.name for item in fields(self.options) if item.name not in shared)

    @property
    def label(self) -> str:
        """Name and edition."""
        return f"{self.name} {self.fingerprint}"

    def answers(self, corpus: str) -> bool:
        """Whether models trained on `corpus` have such an answer."""
        return corpus in ANSWERED.get(self.on, (corpus,))

    def check(self, case: Case) -> None:
        """UsageError where the task has no such answer, the model lacks a fact, or too few loops are read."""
        case.m.facts.need(*self.needs, by=self.name)
        if not self.answers(case.test.task):
            wanted = ", ".join(ANSWERED[self.on])
            raise UsageError(f"{self.name} needs a model of {wanted}; this one is of {case.test.task}")
        if case.n_loops < self.loops:
            raise UsageError(f"{self.name} compares loops; give n_loops of at least {self.loops}")

    def of(self, case: Case, b: MaskedBatch | None = None) -> pd.DataFrame:
        """Its frame of a case: on `b`, if given, else as the case's options say."""
        self.check(case)
        own = {name: getattr(case.options, name) for name in self.own}
        if self.on == "loops":
            return self.run(case, case.counts, **own)
        if self.on != "masks":
            return self.run(case, **own)
        if b is not None:
            return self.run(case, b, **own)
        parts = [self.run(case, b, **own).assign(**{name: value}) for name, value, b in case.batches()]
        return pd.concat(parts, ignore_index=True)


def plain(function: Run, **settings: Any) -> Run:
    """A measure of the usual signature (m, b, n_loops)."""

    def run(case: Case, b: MaskedBatch) -> pd.DataFrame:
        return function(case.m, b, case.n_loops, **settings)

    return run


def fingerprints(names: Iterable[str]) -> dict[str, str]:
    """Editions of several measures, by name."""
    return {name: MEASURES[name].fingerprint for name in sorted(set(names))}


def options_asked(asks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All options of measures, by name, where `asks` gives what is not usual; how far is read is left out."""
    found = {name: MEASURES[name].options.of(name, given).asked() for name, given in asks.items()}
    return {name: {key: options[key] for key in options if key != "n_loops"} for name, options in found.items()}


FILES = ("loopmdm.analysis.measures", "MEASURES")
MEASURES: Registry[Measure] = Registry("measure", Measure, "loopmdm.measures", files=FILES)
