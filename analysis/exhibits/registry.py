"""The registry of exhibits: what the study shows. Batch, notebooks and tests all use it.

An exhibit is a figure with the tables it is drawn from, its builder, a caption that says what would count against
the claim, and the answers to claims that are read off its tables. To add one: an entry in EXHIBITS of a file in
this folder; from another package, an entry point of the group "loopmdm.exhibits".
"""

import base64
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.answers import Answer, Gate
from loopmdm.analysis.exhibits.tables import Table
from loopmdm.analysis.numbers import provenance
from loopmdm.analysis.plots.style import FORMATS, PAGE, described, finish, png_bytes, style
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json, write_atomic, write_json
from loopmdm.model.registry import Registry
from loopmdm.model.training.record import commit, versions
from loopmdm.model.zoo.runs import LOOPED, MAIN_TASKS, Run, Zoo

SIDECAR_TYPE = "application/vnd.loopmdm.figure+json"
Tables = dict[str, pd.DataFrame]
TITLES = {"sudoku": "Sudoku 6x6", "sotu": "text (sotu)"}
"""Of the main tasks."""
ARMS = ("base", "deep", "loop")
"""The arms of the paper's comparison."""
LEAD = 40
"""Words of a caption that are always shown; the rest is folded."""


@dataclass(frozen=True)
class Reading:
    """How the claim of that name is answered on a task, and the tables that are read for it and for its `gate`.

    Without `answer` there is no number: the gate says why the claim cannot be tested.
    """

    claim: str
    answer: Callable[[str], Answer] | None
    reads: tuple[str, ...]
    gate: Callable[[str], Gate] | None = None


@dataclass(frozen=True)
class Exhibit:
    """One figure: the `tables` it is drawn from, its `builder`, a caption with its claim, `answers` to claims.

    `finding` is its title: what was found, in about ten words, "undecided" where it is. Tables that exhibits share
    have their names in `tables.TABLES`; those that it brings along itself stand in `own`, too.
    """

    name: str
    finding: str
    tables: tuple[str, ...]
    builder: Callable[[Tables], MatplotlibFigure]
    caption: str
    answers: tuple[Reading, ...] = ()
    own: tuple[Table, ...] = ()

    @property
    def theme(self) -> str:
        """The word for what it is about: the file of its builder."""
        return self.builder.__module__.rpartition(".")[2]

    def draw(self, out: Path | str | None = None) -> MatplotlibFigure:
        """Draw from the tables; with `out` also write pdf, png, svg and a JSON sidecar there."""
        loaded = self.load()
        with style():
            figure = self._built(loaded)
            if out is not None:
                self._write(figure, Path(out), loaded)
        plt.close(figure)
        return figure

    def show(self) -> "Shown":
        """The figure with its caption and where its numbers come from, for a notebook."""
        loaded = self.load()
        with style():
            figure = self._built(loaded)
            picture = png_bytes(figure)
        return Shown(picture, self.sidecar(loaded, figure), self.lead)

    def _built(self, loaded: Tables) -> MatplotlibFigure:
        """Drawn, with finding and panel letters."""
        figure = self.builder(loaded)
        finish(figure, self.finding)
        return figure

    def alt(self, figure: MatplotlibFigure) -> str:
        """The text in a picture's place: what is seen, and what was found."""
        return f"{self.finding}. {described(figure)}".strip()

    def load(self) -> Tables:
        """Its tables, by name."""
        own = {item.name: item for item in self.own}
        found = {name: tables.load(own.get(name, name)) for name in self.tables}
        empty = next((name for name, frame in found.items() if frame.empty), None)
        if empty is not None:
            raise UsageError(f"table {empty} has no rows; run `loopmdm table {empty}`")
        return found

    def _write(self, figure: MatplotlibFigure, out: Path, loaded: Tables) -> None:
        dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
        for kind in FORMATS:
            write_atomic(
                out / f"{self.name}.{kind}",
                lambda path, kind=kind: figure.savefig(path, format=kind, metadata=dates[kind]),
            )
        write_json(out / f"{self.name}.json", self.sidecar(loaded, figure))

    def is_drawn(self, out: Path) -> bool:
        """Whether its files are in `out`, drawn by this very commit and these versions from the present tables."""
        files = [out / f"{self.name}.{kind}" for kind in (*FORMATS, "json")]
        if not all(file.is_file() for file in files):
            return False
        source = self._source(self.load())
        try:
            told = read_json(files[-1])
        except UsageError:  # half a file of another program: drawn anew
            return False
        known = isinstance(told, dict) and not source["commit"].endswith("+")
        return known and {key: told.get(key) for key in source} == source

    def sidecar(self, loaded: Tables, figure: MatplotlibFigure) -> dict:
        """Finding, caption, alternative text, hashes of tables and models, commit, versions and command."""
        return self._source(loaded) | {"alt": self.alt(figure)}

    def _source(self, loaded: Tables) -> dict:
        return {
            "figure": self.name,
            "finding": self.finding,
            "caption": self.text,
            "tables": {name: frame.attrs["values_sha256"] for name, frame in loaded.items()},
            "options": asked_of(loaded),
            "models": {k: v for frame in loaded.values() for k, v in frame.attrs["models"].items()},
            "commit": commit(),
            "versions": versions(provenance.DRAWING),
            "command": f"loopmdm figures {self.name}",
        }

    @property
    def text(self) -> str:
        """The caption on one line."""
        return " ".join(textwrap.dedent(self.caption).split())

    @property
    def lead(self) -> str:
        """The sentences that a caption begins with, at most `LEAD` words: what is seen."""
        said = ""
        for sentence in re.split(r"(?<=[.?!]) (?=[A-Z(])", self.text):
            if said and len(f"{said} {sentence}".split()) > LEAD:
                break
            said = f"{said} {sentence}".strip()
        return said

    @property
    def rest(self) -> str:
        """What follows: population, intervals, what would contradict it; shown folded."""
        return self.text[len(self.lead) :].strip()


def asked_of(loaded: Tables) -> str:
    """What the measures behind tables were asked: "nll (n_samples 1). settled (mask_ratios 0.25, 0.5; n 256)"."""
    found: dict[str, None] = {}
    for frame in loaded.values():
        for asks in frame.attrs.get("options", {}).values():
            found |= {f"{name} ({_words(options)})": None for name, options in asks.items()}
    return ". ".join(found)


def _words(options: dict[str, object]) -> str:
    return "; ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for key, value in sorted(options.items())
        if value
    )


@dataclass(frozen=True)
class Panel:
    """A main task as figures show it: the looped model of its first seed, the names of all seeds, and a title."""

    run: Run
    seeds: tuple[str, ...]
    title: str

    @property
    def model(self) -> str:
        """The looped model's name."""
        return self.run.name

    def of(self, df: pd.DataFrame) -> pd.DataFrame:
        """Rows of the looped model."""
        return df[df["model"] == self.run.name]


def panels() -> list[Panel]:
    """The main tasks side by side."""
    zoo = Zoo.shipped()
    looped = {task: zoo.select(task=task, arm=LOOPED) for task in MAIN_TASKS}
    return [Panel(zoo.first(task), tuple(run.name for run in looped[task]), TITLES[task]) for task in MAIN_TASKS]


SOLVER = "sudoku-loop-s4"
"""The Sudoku model that is taken apart: of the S_max that leaves the plateau most often."""


def taken_apart() -> dict[str, str]:
    """The models whose computation is looked into, by title: that one, and the looped text model."""
    text = Zoo.shipped().first(MAIN_TASKS[1])
    return {f"{TITLES[MAIN_TASKS[0]]}, $S_{{max}}$ 4": SOLVER, TITLES[MAIN_TASKS[1]]: text.name}


HALF_MASKED = "Half of the positions masked; test sequences; bars and shades: 95% over sequences or documents."


@dataclass(frozen=True)
class Shown:
    """A drawn figure in a notebook; `sidecar` is what the batch writes beside its picture."""

    png: bytes
    sidecar: dict
    lead: str

    def _repr_mimebundle_(self, **_: object) -> dict[str, object]:
        """Picture and caption for people, the sidecar for programs."""
        source = ", ".join(f"{name} {value[:12]}" for name, value in self.sidecar["tables"].items())
        picture, alt = base64.b64encode(self.png).decode(), escape(self.sidecar["alt"])
        page = (
            f'<figure><img alt="{alt}" src="data:image/png;base64,{picture}">'
            f"<figcaption>{escape(self.lead)}<details><summary>more</summary>"
            f"{escape(self.sidecar['caption'][len(self.lead) :].strip())}<br>"
            f"<small>{escape(self.sidecar['command'])}; asked: {escape(self.sidecar['options'])}; tables by hash: "
            f"{escape(source)}</small></details></figcaption></figure>"
        )
        return {"text/html": page, SIDECAR_TYPE: self.sidecar}


SEEDS = """Lines: means over training seeds (numbers in the legend), thin ones single seeds; bands (bars at
single points): 95%, by Student's t over seeds, over test items where there is one seed."""
MEANS = """Lines: means over training seeds; bands: 95%, by Student's t over seeds, over test items where there
is one seed."""
OURS = "Definitions are ours; the paper's are not public."
ONE = "One seed of training."
TEXT = "256 test blocks of 64 tokens from 8 unseen speeches (errors over speeches, Student's t)"
GRIDS = "256 grids of unseen classes (errors over grids)"
"""Parts of captions."""


def compared(df: pd.DataFrame, task: str) -> pd.DataFrame:
    """Rows of the paper's arms on one task."""
    return df[(df["task"] == task) & df["arm"].isin(ARMS)]


OTHER_TASKS = {
    "imdb": "text (imdb)",
    "imdb-d48": "text (imdb), d = 48",
    "wiki": "text (wiki)",
    "gsm": "word problems",
    "sudoku9": "Sudoku 9x9",
    "arithmetic": "arithmetic",
    "tree": "tree",
    "markov": "chain (control)",
}


def elsewhere(df: pd.DataFrame, plot: Callable[..., Axes], ylabel: str) -> MatplotlibFigure:
    """A panel for each task beside the two main ones: `plot(rows, ax=)` of the paper's arms."""
    tasks = [task for task in OTHER_TASKS if task in set(df["task"])]
    rows = -(-len(tasks) // 3)
    drawn, axes = plt.subplots(rows, 3, figsize=(PAGE, 2.3 * rows), layout="constrained", squeeze=False)
    for ax, task in zip(axes.flat, tasks, strict=False):
        plot(compared(df, task), ax=ax)
        ax.set(title=OTHER_TASKS[task], ylabel="")
        ax.legend(frameon=False)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{ylabel}\n(nats per token)")
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    return drawn


def of_models(df: pd.DataFrame) -> pd.DataFrame:
    """With the columns task, arm and seed of each row's model."""
    zoo = Zoo.shipped()
    known = {name: zoo[name] for name in df["model"].unique()}
    runs = [known[name] for name in df["model"]]
    return df.assign(**{field: [getattr(run, field) for run in runs] for field in ("task", "arm", "seed")})


FILES = ("loopmdm.analysis.exhibits", "EXHIBITS")
EXHIBITS: Registry[Exhibit] = Registry("figure", Exhibit, "loopmdm.exhibits", files=FILES)

THEMES = {
    "claims": "Claims",
    "training": "Training",
    "inference": "Inference",
    "generation": "Generation and other corpora",
    "stopping": "Adaptive stopping",
    "attention": "Attention",
    "representation": "Representation",
    "causal": "Causal tests",
    "known": "Known answers",
    "mechanism": "What a loop does",
    "messages": "Who tells whom",
    "others": "Other people's models",
}
"""In the order in which they are shown, with their titles."""


def by_theme() -> dict[str, list[Exhibit]]:
    """All exhibits under the titles of their themes; other packages' come last, under their file's name."""
    found: dict[str, list[Exhibit]] = {title: [] for title in THEMES.values()}
    for exhibit in EXHIBITS.values():
        found.setdefault(THEMES.get(exhibit.theme, exhibit.theme), []).append(exhibit)
    return found
