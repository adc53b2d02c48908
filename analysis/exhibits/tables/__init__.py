"""The tables behind the figures: name -> models, columns, measures, and how to measure it.

Everything is measured on the shipped models and on the test split; masks and puzzles are drawn
by seed. Committed tables lie in figures/tables, what a wheel measures in the cache. Which models a table is of is
a query over a `Zoo` that is handed in, by default what is shipped now.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from loopmdm.analysis.exhibits.tables import internals, others, quality, science, training
from loopmdm.analysis.numbers import frames, place, provenance
from loopmdm.analysis.numbers.parallel import one_thread
from loopmdm.model.errors import UsageError, unknown_name
from loopmdm.model.network.checkpoints import list_runs
from loopmdm.model.places import IN_CHECKOUT, cache_folder, figures_folder
from loopmdm.model.zoo.runs import Select, Zoo, select


@dataclass(frozen=True)
class Table:
    """One table: `compute(zoo)` gives a tidy frame with at least `columns`, from the runs that `models` chooses.

    `asks` are the measures that it asks, with the options that are not their usual ones; `version` is raised when
    what it makes of them changes. It may also read other `tables`, or what was measured for them, and fetched
    corpora of the role or name `reads`.
    """

    name: str
    models: Select
    columns: tuple[str, ...]
    compute: Callable[[Zoo], pd.DataFrame]
    asks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    reads: str = ""
    version: int = 1

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of those that it asks."""
        return tuple(self.asks)

    def measure(self, folder: Path, zoo: Zoo | None = None) -> pd.DataFrame:
        """Compute and write it, then read it back as everyone else will."""
        zoo = Zoo.shipped() if zoo is None else zoo
        names = self.models.names(zoo)
        if not names:
            raise UsageError(f"table {self.name} is of {self.models}; no such run is here, see figures/zoo.toml")
        told = provenance.of_table(self.name, names, **self.made_from(zoo), **place.told())
        with one_thread():
            frame = self.compute(zoo)
        frames.write_table(frame, folder / f"{self.name}.parquet", told)
        return self.read(folder)

    def made_from(self, zoo: Zoo) -> dict[str, dict[str, Any]]:
        """What its values follow from beside the weights: versions of tables, measures, their options, S_max."""
        from loopmdm.analysis.measures import fingerprints, options_asked  # late: drawing does without torch

        parts = self._parts()
        return {
            "tables": {part.name: part.version for part in parts},
            "measures": fingerprints(name for part in parts for name in part.measures),
            "options": {part.name: options_asked(part.asks) for part in parts if part.asks},
            "axes": zoo.axes(self.models.of(zoo)),
        }

    def _parts(self) -> list["Table"]:
        """Itself and the tables that it reads."""
        return [self, *(part for name in self.tables for part in table(name)._parts())]

    def fits(self, told: Mapping[str, Any], zoo: Zoo) -> bool:
        """Whether a stored one that records `told` is what would be measured now."""
        names, models = self.models.names(zoo), told.get("models")
        if not isinstance(models, dict) or models.keys() != set(names) or not set(names) <= set(list_runs()):
            return False
        now = {"models": provenance.model_hashes(names)} | self.made_from(zoo)
        return all(told.get(name) == value for name, value in now.items())

    def read(self, folder: Path) -> pd.DataFrame:
        """The stored table; UsageError if it is damaged, empty, or does not say of which models it is."""
        path = folder / f"{self.name}.parquet"
        frame = frames.read_table(path, self.columns)
        if frame.empty or not isinstance(frame.attrs.get("models"), dict):
            what = "has no rows" if frame.empty else "does not say of which models it is"
            raise UsageError(f"{path} {what}; delete it and run `loopmdm table {self.name}`")
        return frame


def tables_folder() -> Path:
    """Where the committed tables are."""
    return figures_folder() / "tables"


def measured_folder() -> Path:
    """Where tables go that are measured here: outside a checkout, the cache."""
    return tables_folder() if IN_CHECKOUT else cache_folder() / "tables"


def stored_in(item: Table, zoo: Zoo) -> Path | None:
    """The folder that holds a table, None if it is missing; what was measured here goes first while it fits."""
    file, committed, measured = f"{item.name}.parquet", tables_folder(), measured_folder()
    if measured != committed and (measured / file).exists() and item.fits(item.read(measured).attrs, zoo):
        return measured
    return committed if (committed / file).exists() else None


def table(name: str) -> Table:
    """A table of the registry."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    return TABLES[name]


_READ: ContextVar[dict[str, pd.DataFrame] | None] = ContextVar("_READ", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Within, each table is read, and held against the shipped models, once: for what reads the same often."""
    token = _READ.set({} if _READ.get() is None else _READ.get())
    try:
        yield
    finally:
        _READ.reset(token)


def load(given: str | Table, zoo: Zoo | None = None) -> pd.DataFrame:
    """The stored table, by name or itself; a missing one is measured from the shipped models, and that is said."""
    known = _READ.get()
    if known is None or zoo is not None or not isinstance(given, str):
        return _load(table(given) if isinstance(given, str) else given, Zoo.shipped() if zoo is None else zoo)
    if given not in known:
        known[given] = _load(table(given), Zoo.shipped())
    return known[given].copy()


def _load(item: Table, zoo: Zoo) -> pd.DataFrame:
    folder = stored_in(item, zoo)
    if folder is None:
        folder = measured_folder()
        warnings.warn(f"measuring the missing table {item.name} into {folder}, {HOW_LONG}", stacklevel=2)
        return item.measure(folder, zoo)
    frame = item.read(folder)
    if not item.fits(frame.attrs, zoo):
        warnings.warn(outdated(item.name), stacklevel=2)
    return frame


def is_current(given: str | Table, zoo: Zoo | None = None) -> bool:
    """Whether a stored table is of the weights that are shipped, and of the measures as they are."""
    item, zoo = table(given) if isinstance(given, str) else given, Zoo.shipped() if zoo is None else zoo
    return item.fits(item.read(stored_in(item, zoo) or tables_folder()).attrs, zoo)


def outdated(name: str) -> str:
    """What to say of a stored table that is not current."""
    return f"table {name} is of other weights or measures than those here; run `loopmdm table {name}`"


HOW_LONG = "seconds to minutes each (all together take about 40 minutes on two cores)"
"""Of measuring tables."""
EVERY = select()
SUDOKU = select(task="sudoku") | select(task="sudoku9")
KNOWN = select(task=("tree", "markov", "arithmetic"), weights=True)
CARRIED = select(task="arithmetic", arm="loop", weights=True)
ONE_MASK = {"n_samples": 1}
ALONG = science.HALF | {"n": 64, "along_sampling": 16}
"""Options of measures."""


def _contrasts(zoo: Zoo) -> pd.DataFrame:
    return training.contrasts_table(load("nll-by-loops", zoo), load("sudoku-solve-rate", zoo))


def _training_free_of_others(zoo: Zoo) -> pd.DataFrame:
    return others.training_free_table(load("training-free", zoo), zoo)


def _one_measure(name: str, models: Select, columns: tuple[str, ...], options: dict[str, Any]) -> Table:
    """The table of a measure of the same name."""
    compute = partial(science.measured, name, models, **options)
    asked = {key: value for key, value in options.items() if key != "read_to"}
    return Table(name, models, ("model", *columns), compute, {name: asked})


TABLES = {
    item.name: item
    for item in (
        Table(
            "mask-attention",
            science.main_tasks("loop"),
            ("model", "loop", "mass", "log_odds"),
            internals.mask_attention_table,
            {"mask-attention": science.THREE, science.POOLED: science.THREE},
        ),
        Table(
            "representation-change",
            science.FIRST,
            ("model", "loop", "metric", "value"),
            internals.representation_table,
            {"representation-change": science.THREE},
        ),
        Table(
            "mask-attention-by-s-max",
            science.AMOUNTS,
            ("model", "loop", "log_odds"),
            partial(science.pooled_table, science.AMOUNTS),
            {science.POOLED: science.HALF},
        ),
        Table(
            "attention-maps", internals.MAPPED, ("loop", "head", "query", "key"), internals.attention_maps_table
        ),
        Table("example-board", internals.SOLVER, ("panel", "cell", "symbol", "p"), internals.example_board_table),
        Table(
            "learning-curves", EVERY, ("model", "arm", "seed", "flops", "nelbo"), training.learning_curves_table
        ),
        Table("flops-to-target", EVERY, ("task", "arm", "against", "ratio"), training.flops_to_target_table),
        Table("looping-gap", EVERY, ("task", "arm", "at", "tokens", "gap"), training.looping_gap_table),
        Table(
            "nll-by-loops",
            EVERY,
            ("model", "arm", "seed", "n_loops", "nll", "nll_se"),
            quality.nll_table,
            {"nll": ONE_MASK},
        ),
        Table(
            "nll-by-document",
            quality.DOCUMENTS,
            ("model", "arm", "seed", "n_loops", "document", "nll", "n"),
            quality.documents_table,
            {"nll": ONE_MASK},
        ),
        Table(
            "sudoku-solve-rate",
            SUDOKU,
            ("model", "arm", "seed", "n_clues", "n_loops", "solve_rate"),
            partial(quality.solve_rate_table, SUDOKU),
            {"solve-rate": {"orders": ("one-shot",), "n": quality.N_PUZZLES}},
        ),
        Table(
            "arm-contrasts",
            EVERY,
            ("task", "measure", "arm", "against", "difference"),
            _contrasts,
            tables=("nll-by-loops", "sudoku-solve-rate"),
        ),
        Table("references", quality.PAIR, ("task", "reference", "nll"), quality.references_table),
        Table(
            "noise-level",
            science.main_tasks("loop"),
            ("model", "n_loops", "gain"),
            partial(quality.noise_level_table, science.main_tasks("loop")),
            {"nll": ONE_MASK},
            tables=("nll-by-loops",),
        ),
        Table(
            "zero-shot",
            quality.PAIRS,
            ("model", "corpus", "n_loops", "nelbo"),
            partial(quality.text_table, "zero-shot"),
            {"zero-shot": {}},
            reads="zero-shot",
        ),
        Table(
            "generative",
            quality.PAIRS,
            ("model", "n_loops", "steps", "judge_nll", "unigram_entropy"),
            partial(quality.text_table, "generative"),
            {"generative": {}},
            reads="judge",
        ),
        Table(
            "word-problems",
            quality.GSM,
            ("model", "arm", "seed", "problems", "n_loops", "accuracy", "low", "high", "chance"),
            quality.word_problems_table,
            {"word-problems": quality.WORD_PROBLEMS},
            reads="gsm8k-100",
        ),
        Table(
            "attention-controls",
            science.CONTROLS,
            ("model", "arm", "seed", "depth", "log_odds"),
            science.controls_table,
            {"mask-attention": science.HALF},
        ),
        Table(
            "excess-kl",
            KNOWN,
            ("model", "arm", "seed", "n_loops", "hops", "excess_kl"),
            partial(quality.excess_kl_table, KNOWN),
            {"excess-kl": {}},
        ),
        Table(
            "excess-kl-cut",
            CARRIED,
            ("model", "seed", "edges", "n_loops", "hops", "excess_kl"),
            partial(quality.excess_with_cuts_table, CARRIED),
            {"excess-kl-cut": {}},
        ),
        Table(
            "training-free",
            science.main_tasks("base") | science.FIRST,
            ("model", "n_loops", "damping", "change"),
            science.training_free_table,
            {"training-free": {"n_samples": 1}},
        ),
        Table(
            "attention-of-others",
            others.BESIDE,
            ("model", "layer", "loop", "query_group", "key_group", "mass", "log_odds", "nominal_mask_ratio"),
            others.attention_table,
            {science.POOLED: others.ASKED},
            reads="specimen",
        ),
        Table(
            "training-free-of-others",
            others.BESIDE,
            ("model", "first_layer", "n_layers", "n_loops", "damping", "change", "rise"),
            _training_free_of_others,
            {"training-free": {"n_samples": 1, "counts": others.COUNTS}},
            ("training-free",),
            reads="specimen",
        ),
        Table(
            "stopping-verdicts",
            science.LEARNED,
            ("model", "rule", "verdict", "useful"),
            science.verdicts_table,
            {"stopping-verdicts": science.ALL_ITEMS},
        ),
        Table(
            "attention-along-sampling",
            science.FIRST,
            ("model", "step", "loop", "log_odds"),
            partial(science.measured, science.POOLED, science.FIRST, **ALONG),
            {science.POOLED: ALONG},
        ),
        *(_one_measure(*entry) for entry in science.PLAIN),
    )
}
