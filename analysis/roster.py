"""Which runs make up the zoo, from figures/zoo.toml: specs, seeds, and of which seeds the weights are shipped."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopmdm_model.errors import UsageError, check_count, check_keys
from loopmdm_model.training.spec import RunSpec

FIGURES = Path(__file__).parents[1] / "figures"
KEYS = ("spec", "seeds", "weights", "set")


@dataclass(frozen=True)
class Entry:
    """One run of the zoo: figures/specs/`spec`.toml with `seed`; without `weights` only its record is kept.

    `changes` are keys of the spec that this run had otherwise, as `loopmdm train --set` takes them.
    """

    spec: str
    seed: int
    weights: bool
    changes: tuple[tuple[str, Any], ...] = ()

    def load(self, figures: Path = FIGURES) -> RunSpec:
        """The spec as `loopmdm train SPEC --seed SEED --set ..` resolves it."""
        loaded = RunSpec.load(figures / "specs" / f"{self.spec}.toml", dict(self.changes))
        if loaded.seed == self.seed:
            return loaded
        return RunSpec.from_dict(loaded.to_dict() | {"seed": self.seed, "name": f"{loaded.name}-seed{self.seed}"})


def roster(figures: Path = FIGURES) -> list[Entry]:
    """Every run of the zoo, in the order of the file; UsageError names what is wrong in it."""
    path = figures / "zoo.toml"
    if not path.is_file():
        raise UsageError(f"{path} is missing; restore it from the repository")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    check_keys(values, ("run",), path.name)
    entries = [entry for part in values.get("run", []) for entry in _entries(part, path.name)]
    if not entries:
        raise UsageError(f"{path} lists no [[run]]; give each a spec and its seeds")
    twice = [entry for n, entry in enumerate(entries) if (entry.spec, entry.seed) in _keys(entries[:n])]
    if twice:
        raise UsageError(f"{path.name}: seed {twice[0].seed} of {twice[0].spec} is listed twice")
    return entries


def _keys(entries: list[Entry]) -> set[tuple[str, int]]:
    return {(entry.spec, entry.seed) for entry in entries}


def _entries(part: dict[str, Any], origin: str) -> list[Entry]:
    spec, what = part.get("spec"), f"{origin} [[run]] {part.get('spec', '?')}"
    check_keys(part, KEYS, what)
    seeds = part.get("seeds")
    weights = part.get("weights", seeds)
    if not isinstance(spec, str) or not isinstance(seeds, list) or not isinstance(weights, list) or not seeds:
        raise UsageError(f"{what}: needs spec = NAME and seeds = [0, 1, ..]; weights is a list of seeds, too")
    if not set(weights) <= set(seeds):
        raise UsageError(f"{what}: weights {weights} are not all among seeds {seeds}")
    changes = part.get("set", {})
    if not isinstance(changes, dict) or any(isinstance(value, dict) for value in changes.values()):
        raise UsageError(f'{what}: set takes quoted keys, such as set = {{ "training.learning_rate" = 5e-4 }}')
    return [
        Entry(spec, check_count(f"{what} seeds", seed, least=0), seed in weights, tuple(changes.items()))
        for seed in seeds
    ]
