"""Notebooks run as shipped, and show what the batch pipeline draws."""

import subprocess
import sys
from pathlib import Path

import papermill
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_generated_notebooks_match_their_sources():
    outcome = subprocess.run(
        [sys.executable, NOTEBOOKS / "sync.py", "--check"], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("01_attention_across_loops", {}),
        ("01_attention_across_loops", {"model": "sudoku-loop", "text": "123456" * 6}),
    ],
)
def test_each_notebook_runs_top_to_bottom(name, parameters, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures as in Jupyter
    source, target = NOTEBOOKS / f"{name}.ipynb", tmp_path / "out.ipynb"
    done = papermill.execute_notebook(source, target, parameters, progress_bar=False, cwd=str(tmp_path))
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr"], [
        o["text"] for o in outputs if o.get("name") == "stderr"
    ]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 7
