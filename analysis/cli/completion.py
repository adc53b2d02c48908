"""What the shell offers at <tab>: names found in files and sources, since importing them takes seconds."""

import json
import re
from collections.abc import Callable
from pathlib import Path

ANALYSIS = Path(__file__).parents[1]
MODELS = ANALYSIS.parent
ZOOS = ("loopmdm_model", "model")
"""Where the models' package lies beside this one: in a checkout, in a wheel."""


def model_names() -> list[str]:
    """Shipped models, and other people's by the name of their specimen."""
    return _shipped() + _named("Specimen", _home() / "adapters" / "specimens.py")


def dictionary_names() -> list[str]:
    """What a dictionary is made of."""
    return ["list", *model_names()]


def run_names() -> list[str]:
    """What is fetched: the runs of a release, which in a checkout are the models that lie there."""
    manifest = _home() / "zoo" / "manifest.json"
    return ["all", *(sorted(json.loads(manifest.read_text("utf-8"))) if manifest.is_file() else _shipped())]


def spec_names() -> list[str]:
    """Specs that come along."""
    return sorted(path.stem for path in (MODELS / "figures" / "specs").glob("*.toml"))


def measure_names() -> list[str]:
    """Measures of this package."""
    return ["list", *_registered("Measure", "measures")]


def figure_names() -> list[str]:
    """Exhibits of this package."""
    return _registered("Exhibit", "exhibits")


def table_names() -> list[str]:
    """Tables that are kept, and those of the registry."""
    kept = {path.stem for path in (MODELS / "figures" / "tables").glob("*.parquet")}
    return ["list", *sorted(kept | set(_registered("Table", "exhibits")))]


def _home() -> Path:
    return next((MODELS / name for name in ZOOS if (MODELS / name / "zoo").is_dir()), MODELS / ZOOS[0])


def _shipped() -> list[str]:
    return sorted(path.parent.name for path in (_home() / "zoo").glob("*/model.safetensors"))


def _registered(kind: str, folder: str) -> list[str]:
    return sorted({name for path in (ANALYSIS / folder).rglob("*.py") for name in _named(kind, path)})


def _named(kind: str, path: Path) -> list[str]:
    """First arguments of the calls of `kind` in a source: words, or constants that hold one."""
    source = path.read_text(encoding="utf-8")
    found = re.findall(rf'\b{kind}\(\s*(?:name=)?(?:"([\w-]+)"|([A-Z_]+),)', source)
    constants = dict(re.findall(r'^([A-Z_]+) = "([\w-]+)"$', source, re.MULTILINE))
    return [word or constants[name] for word, name in found if word or name in constants]


def among(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """What typer asks: the names that begin as what is typed; where none does, shells offer files."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete
