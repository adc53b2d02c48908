"""What there is to make, from corpora to figures, and what of it is current: the plan that figures/Snakefile runs.

An item is a corpus, a run (trained), a model (a run shipped into the zoo), a table or a figure. Its key is a hash
of the resolved spec (runs, models), or of its name and the keys of what it is made from (tables, figures) and, for
a table, of the editions of its measures. What is current is read from what the things themselves record, never
from file times: train.json holds the spec, a table the hashes of its models and the editions, a figure's sidecar
the hashes of its tables. The plan is that of a `Zoo`; what was imported before makes no difference.

python -m loopmdm.analysis.exhibits.pipeline prints the plan as JSON; with --stamps FOLDER it also leaves one
file for every item that is current, FOLDER/kind/name/key, and removes all others.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from loopmdm.analysis.exhibits import EXHIBITS, tables
from loopmdm.analysis.exhibits.measuring import all_tables
from loopmdm.analysis.exhibits.tables import Table, quality
from loopmdm.model.corpora.fetch import serving, sources
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json, toml_value
from loopmdm.model.network import checkpoints
from loopmdm.model.places import cache_folder, figures_folder
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.zoo.runs import Run, Zoo

KINDS = ("corpus", "run", "model", "table", "figure")
STAMP_TIME = 10**9
"""Seconds; any moment before the first run will do."""


@dataclass(frozen=True)
class Item:
    """One thing to make by `loopmdm` with `command`, from what it `needs` ("kind/name").

    What must be there only while it is being made stands in `after`: when that comes anew, the item stays current.
    """

    kind: str
    name: str
    key: str
    needs: tuple[str, ...]
    after: tuple[str, ...]
    command: tuple[str, ...]
    current: bool

    @property
    def place(self) -> str:
        """Unique: kind/name."""
        return f"{self.kind}/{self.name}"


Items = dict[str, Item]


def plan(zoo: Zoo | None = None) -> Items:
    """Every item by place, each below what it needs; of a zoo (default: the roster)."""
    zoo = Zoo.roster() if zoo is None else zoo
    items: Items = {}
    for item in sources().values():
        there = any(cache_folder().glob(f"{item.sha256[:16]}-*"))
        _add(items, "corpus", item.name, item.sha256, ("data", "fetch", item.name), there)
    for run in zoo:
        _add_run(items, run)
        _add_model(items, run, zoo)
    known = all_tables()
    for name in TopologicalSorter({name: table.tables for name, table in known.items()}).static_order():
        _add_table(items, known[name], zoo)
    for figure in EXHIBITS.values():
        needs = tuple(f"table/{name}" for name in figure.tables)
        drawn = _drawn(figure.name, figure.tables, tables.tables_folder())
        _add(items, "figure", figure.name, "", ("figures", figure.name), drawn, needs)
    return items


def _add(
    items: Items, kind: str, name: str, own: Any, command: tuple[str, ...], recorded: bool,
    needs: tuple[str, ...] = (), after: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Add an item, current if its record says so and all that it needs is current."""
    for need in (*needs, *after):
        if need not in items:
            raise UsageError(f"{kind} {name} needs {need}, which is in no registry; see figures/zoo.toml")
    parts = [items[need] for need in needs]
    text = json.dumps([kind, name, own, [item.key for item in parts]])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    current = recorded and all(item.current for item in parts)
    items[f"{kind}/{name}"] = Item(kind, name, key, needs, after, command, current)


def _corpora(spec: RunSpec) -> tuple[str, ...]:
    wanted = [spec.data.corpus] + (["gpt2-bpe"] if spec.data.tokenizer == "gpt2" else [])
    return tuple(f"corpus/{name}" for name in wanted if name in sources())


def _add_run(items: Items, run: Run) -> None:
    folder, own = _run_folder(run.spec), run.spec.to_dict()
    command = ("train", f"figures/specs/{run.file}.toml", "--seed", str(run.seed), "--resume")
    for key, value in run.changes:
        command += ("--set", f"{key}={_toml(value)}")
    command += ("--out", str(folder)) if folder.name != run.name else ()
    _add(items, "run", run.name, own, command, _recorded_spec(folder) == own, after=_corpora(run.spec))


def _toml(value: Any) -> str:
    """A value as `--set` reads it: a bare word, or TOML where a word would be read as something else."""
    bare = isinstance(value, str) and toml_value(value) == value
    return value if bare else json.dumps(value, ensure_ascii=False)


def _run_folder(spec: RunSpec) -> Path:
    """runs/NAME, or a folder named by the spec's hash if that one holds a run of another spec."""
    from loopmdm.model.training.state import identity_of

    plain = Path("runs") / spec.name
    wanted = json.loads(json.dumps(spec.to_dict()))
    if _saved_identity(plain) in (None, json.loads(json.dumps(identity_of(spec)))):
        return plain
    return plain.with_name(f"{spec.name}.{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]}")


def _saved_identity(folder: Path) -> dict[str, Any] | None:
    """The spec in the state that a run would be resumed from, as it was written."""
    from safetensors import SafetensorError, safe_open

    from loopmdm.model.training.state import STATE_FILE

    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["identity"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return None  # training says what to do about a damaged state
    if not isinstance(found, dict):
        return None
    return {name: value for name, value in found.items() if name != "corpus sha256"}


def _recorded_spec(folder: Path) -> dict[str, Any] | None:
    """The spec in a train.json, with today's defaults for keys it does not have; None if there is no such spec."""
    path = folder / checkpoints.RECORD
    try:
        return RunSpec.from_dict(read_json(path)["spec"]).to_dict() if path.is_file() else None
    except (UsageError, KeyError, TypeError):  # not JSON, or no table of tables
        return None


def _add_model(items: Items, run: Run, zoo: Zoo) -> None:
    home, own = checkpoints.ZOO / run.name, run.spec.to_dict()
    there = (home / checkpoints.WEIGHTS).is_file()
    shipped = there == run.weights and _recorded_spec(home) == own
    command, after = ("ship", str(_run_folder(run.spec))), (f"run/{run.name}", *_corpora(run.spec))
    if not run.weights:  # what the tables ask of it has to be there: it cannot be measured again
        command, shipped = (*command, "--record-only"), shipped and quality.is_kept(run, zoo)
    read_to = None if run.weights else zoo.s_max(run)
    _add(items, "model", run.name, [own, run.weights, read_to], command, shipped, after=after)


def _add_table(items: Items, table: Table, zoo: Zoo) -> None:
    needs = tuple(f"model/{name}" for name in table.models.names(zoo))
    needs += tuple(f"table/{name}" for name in table.tables)
    after = tuple(f"corpus/{item.name}" for item in serving(table.reads)) if table.reads else ()
    current = all(items[need].current for need in needs if need in items)
    told = _attributes(tables.tables_folder() / f"{table.name}.parquet") if current else {}
    fits, own = table.fits(told, zoo), table.made_from(zoo)
    _add(items, "table", table.name, own, ("table", table.name), fits, needs, after)


@cache
def _attributes(path: Path) -> dict[str, Any]:
    """What a table records of itself, without reading its values; {} if it is missing or damaged."""
    import pyarrow.parquet as pq

    try:
        found = json.loads(pq.read_metadata(path).metadata[b"pandas"])["attributes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # pyarrow's own errors are ValueErrors
        return {}
    return found if isinstance(found, dict) else {}


def _drawn(name: str, tables: tuple[str, ...], folder: Path) -> bool:
    from loopmdm.analysis.plots.style import FORMATS

    out = figures_folder() / "out"
    if not all((out / f"{name}.{kind}").is_file() for kind in (*FORMATS, "json")):
        return False
    with contextlib.suppress(UsageError):
        wanted = {table: _attributes(folder / f"{table}.parquet").get("values_sha256") for table in tables}
        told = read_json(out / f"{name}.json")
        return isinstance(told, dict) and told.get("tables") == wanted
    return False


def stamp(items: Items, folder: Path) -> None:
    """Make the files below `folder` be kind/name/key of what is current, and no others.

    All get one time: Snakemake compares the times of inputs and outputs whatever triggers it is given.
    """
    wanted = {folder / item.place / item.key for item in items.values() if item.current}
    for path in [path for kind in KINDS for path in (folder / kind).glob("*/*")]:
        if path not in wanted:
            path.unlink(missing_ok=True)
    for path in wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (STAMP_TIME, STAMP_TIME))


def main(arguments: list[str] | None = None) -> None:
    """Print the plan; one line and exit code 2 on misuse, 1 where a file cannot be read or written."""
    parser = argparse.ArgumentParser(
        prog="python -m loopmdm.analysis.exhibits.pipeline", description="Print the pipeline's plan."
    )
    parser.add_argument("--stamps", type=Path, help="folder: leave a file there for every current item")
    options = parser.parse_args(arguments)
    try:
        items = plan()
        if options.stamps:
            stamp(items, options.stamps)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, OSError) else 2) from None
    json.dump([asdict(item) for item in items.values()], sys.stdout)


if __name__ == "__main__":
    main()
