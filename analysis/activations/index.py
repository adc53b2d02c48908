"""The index of a store, `index.json`: what was to be written, by what, of which model, and which shards are done.

It is rewritten whole after each shard. A shard that it does not name is not there, whatever lies in the folder.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from loopmdm.analysis.activations.identity import Identity
from loopmdm.model.errors import UsageError
from loopmdm.model.files import is_file, read_json, write_json

INDEX = "index.json"
EDITION = 1
"""Of what is written; a store of another edition is refused."""
AGAIN = "go on with record(.., resume=True) or --resume"


@dataclass(frozen=True)
class Shard:
    """One file: rows of one run of sequences under one mask ratio or step."""

    file: str
    n_rows: int


@dataclass(frozen=True)
class Index:
    """`planned`: the shards that make it whole; `done`: those written; `shapes`: what a site holds of a row."""

    model: Identity
    asked: dict[str, Any]
    setting: str
    n_loops: int
    dtype: str
    shapes: dict[str, list[int]]
    planned: tuple[Shard, ...]
    done: tuple[Shard, ...] = ()
    edition: int = EDITION
    written_by: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all shards are written."""
        return len(self.done) == len(self.planned)

    @property
    def said(self) -> dict[str, Any]:
        """What a resumed run must agree in."""
        kept = ("model", "asked", "setting", "n_loops", "dtype", "shapes", "planned", "edition")
        return {name: getattr(self, name) for name in kept}

    def with_done(self, shard: Shard) -> "Index":
        """One shard more."""
        return replace(self, done=(*self.done, shard))

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        write_json(folder / INDEX, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """UsageError where there is none, or one of another edition."""
        if not is_file(folder / INDEX):
            raise UsageError(f"{folder} is no activation store (it has no {INDEX}); make one with record")
        found = read_json(folder / INDEX)
        names = {item.name for item in fields(cls)}
        if not isinstance(found, dict) or found.get("edition") != EDITION or set(found) != names:
            raise UsageError(f"{folder / INDEX} is not of edition {EDITION} of the store; record it anew")
        shards = {name: tuple(Shard(**item) for item in found[name]) for name in ("planned", "done")}
        return cls(**(found | shards | {"model": Identity(**found["model"])}))
