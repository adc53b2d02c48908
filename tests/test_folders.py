"""One import name; in a checkout the folders' own names are the same modules, and a user's own are left alone."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import loopmdm
from loopmdm.folders import FOLDERS, MOVED, now

ROOT = Path(__file__).parents[1]
ALIASES = """
import analysis, loopmdm_model
import loopmdm.analysis, loopmdm.model
from analysis import cut, figures, measures, tables
from analysis.attention import mask_attention
from analysis.interventions import damp
from loopmdm_model import HookedLoopMDM, stats
from loopmdm_model.data import corpora
from loopmdm_model.data.batches import dataset
from loopmdm_model.likelihood import nelbo
import analysis.plots.style, loopmdm_model.training.spec

assert analysis is loopmdm.analysis and loopmdm_model is loopmdm.model
assert cut is loopmdm.cut and HookedLoopMDM is loopmdm.HookedLoopMDM and nelbo is loopmdm.nelbo
assert figures is loopmdm.analysis.exhibits and tables is loopmdm.analysis.exhibits.tables
assert damp is loopmdm.analysis.measures.interventions.damp and measures is loopmdm.analysis.measures
assert mask_attention is loopmdm.mask_attention and corpora is loopmdm.model.corpora.documents
assert dataset is loopmdm.model.tasks.batches.dataset and stats is loopmdm.model.stats
assert loopmdm_model.training.spec is loopmdm.model.training.spec
for module in (analysis, loopmdm_model, corpora, analysis.plots.style):
    assert module.__spec__.name == module.__name__ and module.__name__.startswith("loopmdm."), module
print("same")
"""
OWN = """
import loopmdm, analysis, sys
from loopmdm.analysis import measures
assert analysis.OWN == 3 and not hasattr(analysis, "cut") and loopmdm.cut and "mask-attention" in measures.MEASURES
assert sys.modules["analysis"] is analysis and sys.modules["analysis"] is not loopmdm.analysis
print("own")
"""


def ran(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FIRST = [pytest.param(first, marks=pytest.mark.slow) for first in ("", "import loopmdm.analysis.exhibits")]


@pytest.mark.parametrize("first", [*FIRST, "from analysis import explore"])
def test_the_folders_own_names_are_the_same_modules(first):
    assert ran(first + ALIASES, ROOT) == "same"


@pytest.mark.slow
def test_they_are_found_from_elsewhere_too(tmp_path):
    assert ran(ALIASES, tmp_path) == "same"


@pytest.mark.parametrize("name", ["analysis.py", "analysis/__init__.py"])
@pytest.mark.slow
def test_a_users_own_analysis_neither_breaks_nor_is_broken(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("OWN = 3\n")
    assert ran(OWN, tmp_path) == "own"
    assert ran(f"import analysis{OWN}", tmp_path) == "own"


@pytest.mark.slow
def test_modules_run_under_both_names():
    for name in ("analysis.cli", "loopmdm.analysis.cli"):
        done = subprocess.run([sys.executable, "-m", name, "models"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("model\t"), done.stderr


def test_what_moved_is_there():
    for old, new in MOVED.items():
        assert find_spec(new) is not None, old
        assert now(old) == new and old.partition(".")[0] in FOLDERS
        assert not (ROOT / old.replace(".", "/")).with_suffix(".py").exists(), old
    with pytest.raises(ModuleNotFoundError, match=r"analysis\.nothing"):
        __import__("analysis.nothing")


def test_public_names_are_shown_and_wrong_ones_named():
    for module in (loopmdm, loopmdm.model, loopmdm.analysis):
        assert {"cut", "nelbo", "open_model"} & set(dir(module))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing
    assert {"model", "analysis", "cut", "HookedLoopMDM", "sample", "measure"} <= set(dir(loopmdm))
    assert all(getattr(loopmdm, name) is not None for name in dir(loopmdm) if not name.startswith("_"))


def test_a_wheel_holds_one_package(tmp_path):
    if int(__import__("setuptools").__version__.partition(".")[0]) < 77:
        pytest.skip("setuptools is older than the build needs")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = tmp_path / "lib"
    assert [path.name for path in home.iterdir()] == ["loopmdm"]
    assert (home / "loopmdm/model/corpora/sources.toml").is_file()
    shipped = home / "loopmdm/model/zoo/sudoku-loop"
    assert {"dictionary.json", "dictionary.safetensors"} <= {path.name for path in shipped.iterdir()}
    code = f"import sys; sys.path.insert(0, {str(home)!r})\nimport loopmdm; print(len(loopmdm.list_models()))"
    assert ran(code + f"\nassert loopmdm.__file__.startswith({str(home)!r})", tmp_path).isdigit()
    shutil.rmtree(home)
