"""<tab> offers the names that the registries hold, in three shells, without loading them."""

import json
import subprocess
import sys

import pytest

from loopmdm.analysis.cli import completion
from loopmdm.analysis.exhibits import EXHIBITS
from loopmdm.analysis.exhibits.measuring import all_tables
from loopmdm.analysis.measures import MEASURES
from loopmdm.model.adapters.specimens import SPECIMENS
from loopmdm.model.network.checkpoints import list_models
from loopmdm.model.training.spec import shipped_specs
from tests.commands import loopmdm

ASKED = {
    "measure attention-t": ["attention-tests", "attention-toggle"],
    "measure nll sudoku-loop-s1": ["sudoku-loop-s12"],
    "evaluate sapiens-": ["sapiens-heavy", "sapiens-light"],
    "sample antib": ["antiberty"],
    "figures mask-to-mask-by-": ["mask-to-mask-by-loop"],
    "table learning-": ["learning-curves"],
    "dictionary li": ["list"],
    "models fetch sudoku-loop-s1": ["sudoku-loop-s12"],
    "train smo": ["smoke"],
}


def offered(shell: str, words: str) -> str:
    how = {"_LOOPMDM_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": f"loopmdm {words}"}
    how |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    how |= {"COMP_WORDS": f"loopmdm {words}", "COMP_CWORD": str(len(words.split()))}
    return loopmdm(env=how)[0]


def test_the_names_are_those_of_the_registries():
    assert completion.measure_names() == ["list", *sorted(MEASURES)]
    assert completion.figure_names() == sorted(EXHIBITS)
    assert completion.table_names() == ["list", *sorted(all_tables())]
    assert completion.model_names() == [*list_models(), *SPECIMENS]
    assert completion.dictionary_names() == ["list", *completion.model_names()]
    assert completion.run_names() == ["all", *list_models()]
    assert completion.spec_names() == sorted(shipped_specs())


def test_in_a_wheel_the_runs_of_its_release_are_offered(tmp_path, monkeypatch):
    zoo = tmp_path / "model" / "zoo"
    zoo.mkdir(parents=True)
    (zoo / "manifest.json").write_text('{"two": {}, "one": {}}')
    monkeypatch.setattr(completion, "MODELS", tmp_path)
    assert completion.run_names() == ["all", "one", "two"]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize("words", ASKED)
def test_a_shell_is_offered_the_names_that_begin_so(shell, words):
    assert offered(shell, words).split() == ASKED[words]


def test_zsh_is_offered_them_quoted():
    assert '(("mask-to-mask-by-loop"))' in offered("zsh", "figures mask-to-mask-by-")


def test_each_shell_is_told_how_to_ask(monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    for shell in ("bash", "zsh", "fish"):
        said = loopmdm("--show-completion", shell)[0]
        assert "_LOOPMDM_COMPLETE" in said and shell in said


def test_offering_loads_no_heavy_library():
    code = (
        "import json, sys; from loopmdm.analysis.cli import completion, app; "
        "completion.measure_names(), completion.model_names(), completion.run_names(), completion.spec_names(); "
        "print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pandas", "numpy", "matplotlib"} & set(json.loads(done.stdout))
