"""The tables behind the figures: name -> models, columns, and how to measure it.

Everything is measured on the shipped models and on the test split; masks and puzzles are drawn
by seed. Committed tables lie in figures/tables; a missing one is measured again.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis import frames, provenance, zoo
from analysis.parallel import in_processes
from analysis.tables import internals, quality, science, training
from loopmdm_model.allocator import keep_freed_memory
from loopmdm_model.data.fetch import cached_archive, serving
from loopmdm_model.errors import UsageError, unknown_name


@dataclass(frozen=True)
class Table:
    """One table: `compute` gives a tidy frame with at least `columns`, from `models`.

    It may also read other `tables`, or what was measured for them, and fetched corpora of the role or name
    `reads`.
    """

    name: str
    models: tuple[str, ...]
    columns: tuple[str, ...]
    compute: Callable[[], pd.DataFrame]
    tables: tuple[str, ...] = ()
    reads: str = ""

    def measure(self, folder: Path) -> pd.DataFrame:
        """Compute and write it, then read it back as everyone else will."""
        path = folder / f"{self.name}.parquet"
        frames.write_table(self.compute(), path, provenance.of_table(self.name, self.models))
        return self.read(folder)

    def read(self, folder: Path) -> pd.DataFrame:
        """The stored table."""
        return frames.read_table(folder / f"{self.name}.parquet", self.columns)


def figures_folder() -> Path:
    """The repository's figures folder, or ./figures outside a checkout."""
    beside = Path(__file__).parents[2] / "figures"
    return beside if beside.is_dir() else Path("figures")


def tables_folder() -> Path:
    """Where tables are kept."""
    return figures_folder() / "tables"


def table(name: str) -> Table:
    """A table of the registry."""
    if name not in TABLES:
        raise unknown_name("table", name, TABLES)
    return TABLES[name]


def load(name: str) -> pd.DataFrame:
    """The committed table, measured from the shipped models if it is missing."""
    item, folder = table(name), tables_folder()
    if not (folder / f"{name}.parquet").exists():
        return item.measure(folder)
    frame = item.read(folder)
    if not _fits(frame, item):
        warnings.warn(
            f"table {name} is of other weights than those shipped; run `loopmdm table {name}`", stacklevel=2
        )
    return frame


def is_current(name: str) -> bool:
    """Whether a stored table is of the weights that are shipped."""
    return _fits(table(name).read(tables_folder()), table(name))


def _fits(frame: pd.DataFrame, item: Table) -> bool:
    return frame.attrs["models"] == provenance.model_hashes(item.models)


def measure_all(names: Iterable[str], workers: int = 0) -> Iterator[str]:
    """Measure tables in processes of one thread each (default: one a core); yields names as they are done.

    A table that reads others waits for them. UsageError, before anything is measured, where archives are missing.
    """
    names = list(names)
    _need_archives(names)
    after = {name: set(table(name).tables) for name in names}
    return in_processes(_measure, after, tables_folder(), workers, _prepare)


def _need_archives(names: list[str]) -> None:
    wanted = {name: table(name).reads for name in names if table(name).reads}
    missing = {
        name: reads
        for name, reads in wanted.items()
        if any(cached_archive(item) is None for item in serving(reads))
    }
    if missing:
        raise UsageError(
            f"what the tables {', '.join(missing)} read is not here yet; "
            f"run `loopmdm data fetch {' '.join(dict.fromkeys(missing.values()))}`"
        )


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()


def _measure(name: str, folder: Path) -> None:
    table(name).measure(folder)


EVERY, SUDOKU, TEXT = zoo.names(), zoo.names("sudoku") + zoo.names("sudoku9"), ("sotu-base", "sotu-loop")
KNOWN = zoo.names("tree") + zoo.names("markov")


def _contrasts() -> pd.DataFrame:
    return training.contrasts_table(load("nll-by-loops"), load("sudoku-solve-rate"))


TABLES = {
    item.name: item
    for item in (
        Table(
            "mask-attention",
            science.main_tasks("loop"),
            ("model", "loop", "mass", "log_odds"),
            internals.mask_attention_table,
        ),
        Table(
            "representation-change",
            science.LOOPED,
            ("model", "loop", "metric", "value"),
            internals.representation_table,
        ),
        Table(
            "mask-attention-by-s-max",
            science.amounts(),
            ("model", "loop", "log_odds"),
            lambda: science.measured("mask-attention-pooled", science.amounts(), read_to=science.READ_TO),
        ),
        Table("attention-maps", ("sotu-loop",), ("loop", "head", "query", "key"), internals.attention_maps_table),
        Table(
            "learning-curves", EVERY, ("model", "arm", "seed", "flops", "nelbo"), training.learning_curves_table
        ),
        Table("flops-to-target", EVERY, ("task", "arm", "against", "ratio"), training.flops_to_target_table),
        Table("nll-by-loops", EVERY, ("model", "arm", "seed", "n_loops", "nll", "nll_se"), quality.nll_table),
        Table(
            "sudoku-solve-rate",
            SUDOKU,
            ("model", "arm", "seed", "n_clues", "n_loops", "solve_rate"),
            quality.solve_rate_table,
        ),
        Table(
            "arm-contrasts",
            EVERY,
            ("task", "measure", "arm", "against", "difference"),
            _contrasts,
            tables=("nll-by-loops", "sudoku-solve-rate"),
        ),
        Table("references", TEXT, ("task", "reference", "nll"), quality.references_table),
        Table(
            "noise-level",
            science.main_tasks("loop"),
            ("model", "n_loops", "gain"),
            quality.noise_level_table,
            tables=("nll-by-loops",),
        ),
        Table(
            "zero-shot",
            TEXT,
            ("model", "corpus", "n_loops", "nelbo"),
            lambda: quality.text_table("zero-shot"),
            reads="zero-shot",
        ),
        Table(
            "generative",
            TEXT,
            ("model", "n_loops", "steps", "judge_nll", "unigram_entropy"),
            lambda: quality.text_table("generative"),
            reads="judge",
        ),
        Table(
            "word-problems",
            zoo.names("gsm"),
            ("model", "arm", "seed", "problems", "n_loops", "accuracy", "low", "high", "chance"),
            quality.word_problems_table,
            reads="gsm8k-100",
        ),
        Table(
            "attention-controls",
            science.controls(),
            ("model", "arm", "seed", "depth", "log_odds"),
            science.controls_table,
        ),
        Table(
            "excess-kl",
            KNOWN,
            ("model", "arm", "seed", "n_loops", "hops", "excess_kl"),
            quality.excess_kl_table,
        ),
        Table(
            "training-free",
            science.main_tasks("base") + science.LOOPED,
            ("model", "n_loops", "damping", "change"),
            science.training_free_table,
        ),
        Table(
            "stopping-verdicts",
            science.looped(),
            ("model", "rule", "verdict", "useful"),
            science.verdicts_table,
        ),
        Table(
            "attention-along-sampling",
            science.LOOPED,
            ("model", "step", "loop", "log_odds"),
            lambda: science.measured("mask-attention-pooled", science.LOOPED, n=64, along_sampling=16),
        ),
        *(
            Table(
                name,
                models,
                ("model", *columns),
                lambda name=name, models=models, options=options: science.measured(name, models, **options),
            )
            for name, models, columns, options in science.PLAIN
        ),
    )
}
