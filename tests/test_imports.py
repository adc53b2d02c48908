"""Imports flow one way, and looking at a model's name costs no heavy library."""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


FLOORS = (
    "folders model.errors model.information model.work",
    "model.places model.precision model.files model.randomness model.registry model.layout model.context "
    "model.means model.batching",
    "model.sites model.flops model.tiles model.sequences model.blocks",
    "model.taps",
    "model.masking model.stopping model.corpora model.adapters.cycles",
    "model.adapters.kinds",
    "model.adapters.families",
    "model.protocol",
    "model.tasks model.network",
    "model.diffusion",
    "model.hooks",
    "model.adapters model.training model.planted",
    "model.zoo",
    "analysis.numbers analysis.plots",
    "analysis.watch",
    "analysis.activations",
    "analysis.measures",
    "analysis.exhibits",
    "analysis.report analysis.harness",
    "analysis.cli",
    "__main__",
)
"""From the ground up: a file imports what is in its own room, and what lies below; late imports count, too."""
FACES = {"", "model", "analysis"}
"""Packages that only hand on names, from everywhere below them."""


def files() -> dict[str, Path]:
    """Every file of the product by its name below `loopmdm`."""
    found = {}
    for folder, name in (("loopmdm", ""), ("loopmdm_model", "model"), ("analysis", "analysis")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [name, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part not in ("", "__init__"))] = path
    return found


def arrows() -> dict[str, set[str]]:
    """What each file imports of the others, anywhere in it."""
    known = files()

    def targets(path: Path) -> set[str]:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name.removeprefix("loopmdm.") in known else node.module for name in whole}
        return {name.removeprefix("loopmdm.") for name in found if name.startswith("loopmdm.")}

    return {name: targets(path) - {name} for name, path in known.items()}


def room(name: str) -> tuple[int, str]:
    """Floor and room of a file: the longest entry of FLOORS that it lies in."""
    rooms = {entry: floor for floor, entries in enumerate(FLOORS) for entry in entries.split()}
    inside = [entry for entry in rooms if f"{name}.".startswith(f"{entry}.")]
    assert inside, f"{name} stands on no floor"
    entry = max(inside, key=len)
    return rooms[entry], entry


def test_no_import_runs_upward():
    for name, found in arrows().items():
        if name in FACES:
            continue
        floor, entry = room(name)
        for target in found - FACES:
            below, other = room(target)
            assert below < floor or other == entry, f"{name} imports {target}"


def test_no_files_import_each_other_in_a_circle():
    list(TopologicalSorter(arrows()).static_order())  # CycleError names them


def test_the_model_does_not_know_the_analysis():
    for path in (ROOT / "loopmdm_model").rglob("*.py"):
        assert not {name for name in imported(path) if name.startswith(("loopmdm.analysis", "tests"))}, path


def test_only_the_hooked_model_knows_transformer_lens():
    users = {
        path.name
        for package in ("loopmdm", "loopmdm_model", "analysis")
        for path in (ROOT / package).rglob("*.py")
        if any(name.split(".")[0] == "transformer_lens" for name in imported(path))
    }
    assert users == {"hooked.py", "points.py", "scopes.py", "unrolled.py", "cache.py"}  # the last two on call only


def test_plots_know_no_torch():
    for path in (ROOT / "analysis" / "plots").glob("*.py"):
        heavy = {name for name in imported(path) if name.startswith(("torch", "loopmdm.model"))}
        assert not heavy, path
    code = "from loopmdm.analysis.plots import attention, quality; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


STATISTICS = {
    "agg", "aggregate", "apply", "average", "corr", "cov", "describe", "mean", "median", "nanmean", "nanstd",
    "nanvar", "ppf", "quantile", "sem", "std", "transform", "var",
}  # fmt: skip
"""What plots ask of no frame, array or library: their frames hold means and intervals as columns."""


def statistics_in(source: str) -> set[str]:
    """Names of statistics that a source uses as attributes, and libraries or files of ours that make them."""
    tree = ast.parse(source)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & STATISTICS
    makers = ("scipy", "statistics", "loopmdm.analysis.numbers", "loopmdm.analysis.measures")
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        used |= {name for name in names if f"{name}.".startswith(tuple(f"{maker}." for maker in makers))}
    return used


def test_plots_hold_no_statistics():
    for path in (ROOT / "analysis" / "plots").glob("*.py"):
        assert not statistics_in(path.read_text()), path
    for source in ("from scipy import stats", "df.groupby('seed')['y'].mean()", "import scipy.stats", "np.std(x)",
                   "from loopmdm.analysis.numbers.estimate import half_width"):  # fmt: skip
        assert statistics_in(source), source


def test_importing_the_model_and_the_statistics_is_light():
    code = (
        "import sys, loopmdm.model, loopmdm.analysis.numbers.stats; "
        "heavy = {'transformer_lens', 'transformers', 'pandas', 'accelerate', 'matplotlib', 'scipy'}; "
        "heavy &= sys.modules.keys(); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


HIDDEN = """
import importlib.machinery, json, pkgutil, sys
from importlib import import_module
hidden, kept = (set(json.loads(word)) for word in sys.argv[1:3])
find = importlib.machinery.PathFinder.find_spec
def spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(spec)
import loopmdm.model, loopmdm.analysis
for package in (loopmdm.model, loopmdm.analysis):
    for item in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if item.name not in kept:
            import_module(item.name)
"""
"""Imports all modules but some, where packages are not to be found (nor by `find_spec`, as optional ones are)."""
NEEDS_EXTRAS = ["loopmdm.analysis.harness", "loopmdm.analysis.cli.__main__"]
"""The first is a class of lm-eval's, the second runs the program."""


def locked(name: str) -> set[str]:
    """Packages of a lock file."""
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    return {same(line.partition("==")[0]) for line in lines if line[:1].isalnum()}


def same(name: str) -> str:
    """A package's name as packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_the_program_is_imported_without_the_extras():
    extras = (locked("dev") | locked("pipeline")) - locked("base") - locked("torch") - locked("build")
    known = packages_distributions()
    hidden = {module for module, owners in known.items() if {same(owner) for owner in owners} <= extras}
    assert {"lm_eval", "snakemake", "ortools", "pytest"} <= hidden
    words = [json.dumps(sorted(hidden)), json.dumps(NEEDS_EXTRAS)]
    subprocess.run([sys.executable, "-c", HIDDEN, *words], check=True, timeout=300)


def test_what_builds_is_installed_before_what_is_built():
    order = re.findall(r"-r locks/(\S+)\.txt", (ROOT / "Makefile").read_text())
    assert order[0] == "build"
    assert locked("build") == {"setuptools", "wheel"}


LISTED = """
import json, sys
sys.argv = ["loopmdm", *json.loads(sys.argv[1])]
from loopmdm.analysis.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
print(*sys.modules, file=sys.stderr)
"""
"""A command, then the modules that it took, on stderr."""
DRAWING = {"matplotlib", "seaborn", "scipy.stats"}
COMPILER = {"torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "sympy", "accelerate"}
"""What costs as much as torch itself, and nothing here needs but training on several processes."""
ALL = {"torch", "pandas", "numpy", "transformers", "transformer_lens", "datasets"} | DRAWING | COMPILER


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], ALL),
        (["measure", "--help"], ALL),
        (["models"], ALL - {"torch", "numpy"}),
        (["measure", "mask-attention", "sudoku-loop", "--n", "4"], DRAWING | COMPILER),
        (["claims"], COMPILER),
    ],
)
@pytest.mark.slow
def test_a_command_imports_no_more_than_it_needs(words, heavy):
    command = [sys.executable, "-c", LISTED, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout and not heavy & set(done.stderr.split())


def test_importing_the_name_imports_no_part_of_it():
    code = "import sys, loopmdm; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"loopmdm.model", "loopmdm.analysis", "torch", "numpy"} & set(done.stdout.split())
