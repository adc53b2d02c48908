"""The registry of measures: what can be asked of a model, from notebook, command line and tables alike.

A measure is a function of a `Case` (a model and its test set) that gives a tidy frame, in one of three forms:

    run(case, b, **own)         on "masks": a masked batch at each mask ratio, or along the model's own samples
    run(case, **own)            on "test set", or on the task it needs: it draws its own masks
    run(case, counts, **own)    on "loops": what the model can do at each loop count

To add one: a file below this folder with the function and `MEASURES = (Measure(...),)`; from another package, an
entry point of the group "loopmdm.measures" that names a `Measure` or a list of them.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, get_args

import pandas as pd

from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.options import ByLoops, OnMasks, OnTests, Options, options_of
from loopmdm.analysis.measures.starts import over_starts
from loopmdm.analysis.numbers.editions import Edition
from loopmdm.model.errors import UsageError
from loopmdm.model.layout import By
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
    model must have (`layout.NEEDS`). `loops`: the fewest that it can compare. `groupless`: how it is run on models
    without masked positions (case, b, **own), if it says something of them. `both_ways`: `run` takes `by`, what
    puts a position into a group (`layout.By`). `others`: other people's models, and own texts, can be asked, too.
    `shards`: all its forwards go through `Rows.each` on the case's sequences, so that it comes in shards.
    """

    name: str
    what: str
    run: Run
    on: str = "masks"
    samples: bool = False
    needs: tuple[str, ...] = ("masks", "bidirectional")
    loops: int = 1
    groupless: Run | None = None
    both_ways: bool = False
    others: bool = True
    shards: bool = False

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
        if not self.others and not case.ours:
            raise UsageError(
                f"{self.name} is asked of shipped models and run folders only; of other models, and on --text: "
                "nll and noise-level"
            )
        if not self.answers(case.test.task):
            wanted = ", ".join(ANSWERED[self.on])
            raise UsageError(f"{self.name} needs a model of {wanted}; this one is of {case.test.task}")
        self._check_loops(case)

    def _check_loops(self, case: Case) -> None:
        if case.n_loops < self.loops:
            raise UsageError(f"{self.name} compares loops; give n_loops of at least {self.loops}")

    def of(self, case: Case, b: MaskedBatch | None = None) -> pd.DataFrame:
        """Its frame of a case: on `b`, if given, else as its options say; a mean over random first states."""
        own = {name: getattr(case.options, name) for name in self.own}
        if b is None and self.groupless is not None and not case.m.facts.grouped:
            return self._groupless(case, self.groupless, own)
        self.check(case)
        if b is not None:
            return over_starts(case.m, lambda: self.run(case, b, **own))
        case.m.facts.warn_beyond(case.most_masked if self.on == "masks" else 1.0, self.name)
        if self.on == "masks":
            return over_starts(case.m, lambda: self._on_masks(case, own))
        given = (case, case.counts) if self.on == "loops" else (case,)
        return over_starts(case.m, lambda: self.run(*given, **own))

    def labelled(self, frame: pd.DataFrame, case: Case, name: str) -> pd.DataFrame:
        """Its frame with columns that say of which model, task and number of units it is."""
        if self.on == "loops":  # has columns of its own for what it is of
            frame.insert(0, "model", name)
            frame.attrs["remarks"] = case.m.facts.remarks
            return frame
        frame = frame.drop(columns=["model", "task"], errors="ignore")
        frame.insert(0, "model", name)
        frame.insert(1, "task", case.test.label)
        frame.attrs["remarks"] = case.m.facts.remarks
        over_samples = self.samples or getattr(case.options, "along_sampling", 0)
        if "n_units" not in frame and not over_samples:
            frame["n_units"] = case.n_units
        return frame

    def _on_masks(self, case: Case, own: dict[str, Any]) -> pd.DataFrame:
        """On every batch; in shifted models by what positions hold and by what they predict."""
        both = [{"by": by} for by in get_args(By)] if self.both_ways and case.m.facts.shifted else [{}]
        parts = [
            self.run(case, b, **own, **by).assign(**{name: value}, **by)
            for name, value, b in case.batches()
            for by in both
        ]
        return pd.concat(parts, ignore_index=True)

    def _groupless(self, case: Case, run: Run, own: dict[str, Any]) -> pd.DataFrame:
        """Of a model without masked positions: everything is clean, masked rows are NaN with n = 0."""
        self._check_loops(case)
        lacks = "is causal" if case.m.facts.causal else "has no [MASK]"
        warnings.warn(
            f"{self.name}: this model {lacks}, so masked and clean positions are no groups of it; their rows are "
            "NaN with n = 0, and what is defined is measured on the sequences as they are",
            stacklevel=4,
        )
        return over_starts(case.m, lambda: run(case, case.unmasked(), **own)).assign(nominal_mask_ratio=0.0)


def plain(function: Run, **settings: Any) -> Run:
    """A measure of the usual signature (m, b, n_loops)."""

    def run(case: Case, b: MaskedBatch, **more: Any) -> pd.DataFrame:
        return function(case.m, b, case.n_loops, **settings, **more)

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
