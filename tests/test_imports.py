"""Imports flow one way, and looking at a model's name costs no heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

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


def test_importing_the_model_is_light():
    code = (
        "import sys, loopmdm.model; "
        "heavy = {'transformer_lens', 'transformers', 'pandas', 'accelerate', 'matplotlib', 'scipy'}; "
        "heavy &= sys.modules.keys(); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
