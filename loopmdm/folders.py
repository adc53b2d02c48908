"""Where the parts of `loopmdm` lie: in a wheel inside it, in a checkout in the folders beside it.

In a checkout the folders' own names, `loopmdm_model` and `analysis`, are the modules of `loopmdm` themselves.
A script that says `from analysis import cut` gets the very objects of `loopmdm.analysis`: a folder imported under
its own name hands over to the module of `loopmdm` (`hand_over`), and from then on all that is looked for below
that name is found there. Files that have moved are found where they are now (`MOVED`). A folder or file of a
user's own with such a name is none of ours and is left alone.
"""

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

FOLDERS = {"loopmdm_model": "loopmdm.model", "analysis": "loopmdm.analysis"}
MOVED = {
    "analysis.allocation": "loopmdm.analysis.measures.stopping",
    "analysis.attention": "loopmdm.analysis.measures.attention",
    "analysis.attention.groups": "loopmdm.analysis.watch.groups",
    "analysis.attention.walk": "loopmdm.analysis.watch.walk",
    "analysis.cases": "loopmdm.analysis.measures.case",
    "analysis.claims": "loopmdm.analysis.exhibits.verdicts",
    "analysis.claims.answers": "loopmdm.analysis.exhibits.answers",
    "analysis.decomposition": "loopmdm.analysis.measures.quality.decomposition",
    "analysis.editions": "loopmdm.analysis.numbers.editions",
    "analysis.efficiency": "loopmdm.analysis.measures.quality.efficiency",
    "analysis.evaluations": "loopmdm.analysis.measures",
    "analysis.evaluations.solving": "loopmdm.analysis.measures.quality.solving",
    "analysis.evaluations.questions": "loopmdm.analysis.measures.quality.questions",
    "analysis.evaluations.likelihoods": "loopmdm.analysis.measures.quality.likelihoods",
    "analysis.evaluations.generation": "loopmdm.analysis.measures.quality.generation",
    "analysis.figures": "loopmdm.analysis.exhibits",
    "analysis.figures.adaptive": "loopmdm.analysis.exhibits.stopping",
    "analysis.figures.entry": "loopmdm.analysis.exhibits.registry",
    "analysis.frames": "loopmdm.analysis.numbers.frames",
    "analysis.interventions": "loopmdm.analysis.measures.interventions",
    "analysis.judge": "loopmdm.analysis.measures.quality.judge",
    "analysis.known": "loopmdm.analysis.measures.known",
    "analysis.parallel": "loopmdm.analysis.numbers.parallel",
    "analysis.pipeline": "loopmdm.analysis.exhibits.pipeline",
    "analysis.plots.adaptive": "loopmdm.analysis.plots.stopping",
    "analysis.provenance": "loopmdm.analysis.numbers.provenance",
    "analysis.representation": "loopmdm.analysis.measures.representation",
    "analysis.representation.trajectory": "loopmdm.analysis.watch.states",
    "analysis.stopping": "loopmdm.analysis.measures.stopping",
    "analysis.store": "loopmdm.analysis.numbers.store",
    "analysis.tables": "loopmdm.analysis.exhibits.tables",
    "analysis.training_free": "loopmdm.analysis.measures.interventions.training_free",
    "loopmdm_model.adaptive": "loopmdm.model.stopping.halting",
    "loopmdm_model.allocator": "loopmdm.model.training.allocator",
    "loopmdm_model.cache": "loopmdm.model.hooks.cache",
    "loopmdm_model.checkpoints": "loopmdm.model.network.checkpoints",
    "loopmdm_model.config": "loopmdm.model.network.config",
    "loopmdm_model.data.batches": "loopmdm.model.tasks.batches",
    "loopmdm_model.data.benchmarks": "loopmdm.model.tasks.benchmarks",
    "loopmdm_model.data.corpora": "loopmdm.model.corpora.documents",
    "loopmdm_model.data.fetch": "loopmdm.model.corpora.fetch",
    "loopmdm_model.data.gsm": "loopmdm.model.tasks.gsm",
    "loopmdm_model.data.hub": "loopmdm.model.corpora.hub",
    "loopmdm_model.data.own_files": "loopmdm.model.corpora.own_files",
    "loopmdm_model.data.propagation": "loopmdm.model.tasks.propagation",
    "loopmdm_model.data.puzzles": "loopmdm.model.tasks.puzzles",
    "loopmdm_model.data.readers": "loopmdm.model.corpora.readers",
    "loopmdm_model.data.solver": "loopmdm.model.tasks.solver",
    "loopmdm_model.data.sudoku": "loopmdm.model.tasks.sudoku",
    "loopmdm_model.data.tokenizer": "loopmdm.model.corpora.tokenizer",
    "loopmdm_model.data.trees": "loopmdm.model.tasks.trees",
    "loopmdm_model.data.windows": "loopmdm.model.corpora.windows",
    "loopmdm_model.depth": "loopmdm.model.hooks.depth",
    "loopmdm_model.doors": "loopmdm.model.hooks.doors",
    "loopmdm_model.evaluation": "loopmdm.model.tasks.test_sets",
    "loopmdm_model.folded": "loopmdm.model.hooks.folded",
    "loopmdm_model.hooked": "loopmdm.model.hooks.hooked",
    "loopmdm_model.layers": "loopmdm.model.network.layers",
    "loopmdm_model.likelihood": "loopmdm.model.diffusion.likelihood",
    "loopmdm_model.model": "loopmdm.model.network.model",
    "loopmdm_model.moments": "loopmdm.analysis.numbers.moments",
    "loopmdm_model.orders": "loopmdm.model.diffusion.orders",
    "loopmdm_model.points": "loopmdm.model.hooks.points",
    "loopmdm_model.prompts": "loopmdm.model.diffusion.prompts",
    "loopmdm_model.sampling": "loopmdm.model.diffusion.sampling",
    "loopmdm_model.scopes": "loopmdm.model.hooks.scopes",
    "loopmdm_model.stats": "loopmdm.analysis.numbers.stats",
    "loopmdm_model.stopping": "loopmdm.model.stopping.rules",
    "loopmdm_model.text": "loopmdm.model.hooks.text",
    "loopmdm_model.trajectories": "loopmdm.model.diffusion.trajectories",
    "loopmdm_model.unrolled": "loopmdm.model.hooks.unrolled",
}
"""By the old name, below its folder's; a package goes before what is in it."""


def now(name: str) -> str:
    """What a module below a folder's own name is called in `loopmdm`."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        head = ".".join(parts[:length])
        if head in MOVED:
            return ".".join([MOVED[head], *parts[length:]])
    return ".".join([FOLDERS[parts[0]], *parts[1:]])


class Same(InspectLoader):
    """Loads a module that is there already, or an empty package where only what was in it has moved."""

    def __init__(self, name: str):
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:  # noqa: ARG002
        """The module of `loopmdm`."""
        if not self.name:
            return None
        module = import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run; its own spec, which importing it anew replaced, is put back."""
        if self.name:
            module.__spec__ = self.spec

    def get_code(self, fullname: str) -> CodeType | None:  # noqa: ARG002 - for `python -m`
        """Of the module of `loopmdm`."""
        return self._loader().get_code(self.name)

    def get_source(self, fullname: str) -> str | None:  # noqa: ARG002
        """Of the module of `loopmdm`."""
        return self._loader().get_source(self.name)

    def _loader(self) -> Any:
        spec = _found(self.name)
        if spec is None:
            raise ImportError(f"no module named {self.name!r}")
        return spec.loader


class Beside(MetaPathFinder):
    """Finds the parts of `loopmdm` in the checkout `root`, whatever else is installed."""

    def __init__(self, root: Path):
        self.parts = {name: root / folder / "__init__.py" for folder, name in FOLDERS.items()}

    def find_spec(
        self,
        fullname: str,
        path: Iterable[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """A spec of the folder's `__init__`, None for all that is no part."""
        if fullname not in self.parts:
            return None
        place = self.parts[fullname]
        return spec_from_file_location(fullname, place, submodule_search_locations=[str(place.parent)])


def find_beside(file: str) -> None:
    """What `loopmdm` (its `file`) calls when it is imported: a no-op where its parts lie inside it."""
    root = Path(file).resolve().parents[1]
    if all((root / folder / "__init__.py").is_file() for folder in FOLDERS):
        sys.meta_path.insert(0, Beside(root))


class Below(MetaPathFinder):
    """Finds what lies below a folder's own name, once that folder has handed over."""

    def find_spec(
        self,
        fullname: str,
        path: Iterable[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """A spec of the same module, None for all that is not ours."""
        folder, dot, _ = fullname.partition(".")
        if not dot or folder not in FOLDERS or sys.modules.get(folder) is not sys.modules.get(FOLDERS[folder]):
            return None
        found = _found(now(fullname))
        if found is None:
            emptied = any(old.startswith(f"{fullname}.") for old in MOVED)
            return ModuleSpec(fullname, Same(""), is_package=True) if emptied else None
        package = found.submodule_search_locations is not None
        return ModuleSpec(fullname, Same(found.name), origin=found.origin, is_package=package)


def _found(name: str) -> ModuleSpec | None:
    """Its spec; None for what is not there, such as a folder that only caches are left of."""
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:
        return None
    return spec if spec is not None and spec.origin is not None else None


def hand_over(folder: str) -> None:
    """What a folder's `__init__` calls when it is imported under its own name."""
    if folder in FOLDERS:
        if not any(isinstance(finder, Below) for finder in sys.meta_path):
            sys.meta_path.insert(0, Below())
        sys.modules[folder] = import_module(FOLDERS[folder])


def named(package: str, homes: Mapping[str, str], name: str) -> Any:
    """What a part gives by a name on first use: of the module in `homes`, or a module of its own.

    A script may also know a module there that has moved; AttributeError for all else.
    """
    if name in homes:
        return getattr(import_module(homes[name]), name)
    if not name.startswith("_") and _found(f"{package}.{name}") is not None:
        return import_module(f"{package}.{name}")
    old = next((f"{folder}.{name}" for folder, new in FOLDERS.items() if new == package), "")
    if old in MOVED:
        return import_module(MOVED[old])
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
