"""Notebooks run as shipped, without a word on stderr, and show every figure of the batch pipeline once."""

import re
import subprocess
import sys
from pathlib import Path

import jupytext
import papermill
import pytest

from loopmdm.analysis.exhibits import FIGURES, tables
from loopmdm.analysis.exhibits.registry import SIDECAR_TYPE

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = {source.stem: source for source in sorted(NOTEBOOKS.glob("[0-9]*.py"))}
LONGEST_CELL = 15
ON_SUDOKU = {"model": "sudoku-loop", "n": 24}
QUICK = {
    "01_tour": {"n_loops": 7},
    "02_training": {"flops": 2e10},
    "04_attention": {"n": 8, "n_loops": 7},
    "05_representation": {"n": 8, "far": 24},
    "06_adaptive_stopping": {"n": 24},  # a predictor needs 20
}
"""Few sequences and loops, beyond S_max where the notebook looks there; `n` alone is enough for the others."""
GRID = "123456456123231564564231312645645312"


def figures_named(name: str) -> list[str]:
    return re.findall(r'^figures\.FIGURES\["([\w-]+)"\]\.show\(\)$', SOURCES[name].read_text(), re.MULTILINE)


def test_generated_notebooks_match_their_sources():
    outcome = subprocess.run(
        [sys.executable, NOTEBOOKS / "sync.py", "--check"], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr


def test_every_figure_is_shown_in_exactly_one_notebook():
    found = [figure for name in SOURCES for figure in figures_named(name)]
    assert sorted(found) == sorted(FIGURES)
    assert "claims" in figures_named("01_tour")


@pytest.mark.parametrize("name", SOURCES)
def test_cells_are_short_and_one_is_for_parameters(name):
    cells = [cell for cell in jupytext.read(SOURCES[name]).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if len(cell.source.splitlines()) > LONGEST_CELL] == []
    assert ["parameters" in cell.metadata.get("tags", []) for cell in cells].count(True) == 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(pytest.param(name, QUICK.get(name, {"n": 8}), marks=pytest.mark.slow) for name in SOURCES),
        *(pytest.param(name, {}, marks=pytest.mark.soak) for name in SOURCES),
        pytest.param("04_attention", ON_SUDOKU | {"text": GRID}, marks=pytest.mark.soak),
        pytest.param("06_adaptive_stopping", ON_SUDOKU, marks=pytest.mark.soak),
    ],
)
def test_each_notebook_runs_and_shows_what_the_batch_draws(name, parameters, tmp_path, monkeypatch):
    """Every cell, of few sequences (`make slow`), or as shipped (`make soak`)."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures as in Jupyter
    source, target = NOTEBOOKS / f"{name}.ipynb", tmp_path / "out.ipynb"
    done = papermill.execute_notebook(source, target, parameters, progress_bar=False, cwd=str(tmp_path))
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    sidecars = [output["data"][SIDECAR_TYPE] for output in outputs if SIDECAR_TYPE in output.get("data", {})]
    assert [sidecar["figure"] for sidecar in sidecars] == figures_named(name)
    for sidecar in sidecars:
        figure = FIGURES[sidecar["figure"]]
        values = {table: tables.load(table).attrs["values_sha256"] for table in figure.tables}
        assert (sidecar["tables"], sidecar["caption"]) == (values, figure.text)
