"""The plan is that of the zoo handed in; a changed measure makes exactly the tables that ask it not current."""

import itertools
import json
import pkgutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest

import loopmdm.analysis
import loopmdm.model
from loopmdm.analysis.exhibits import EXHIBITS, pipeline, tables
from loopmdm.analysis.measures import MEASURES
from loopmdm.analysis.measures.stopping import record
from loopmdm.model.places import figures_folder
from loopmdm.model.stopping.rules import StateDelta
from loopmdm.model.zoo.runs import Zoo

pytestmark = pytest.mark.weights  # what is current depends on which weights are here

ROOT = Path(__file__).parents[3]
IN_A_FRESH_PROCESS = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from loopmdm.analysis.exhibits import pipeline
from loopmdm.model.zoo.runs import Zoo
items = pipeline.plan(Zoo.roster(Path(sys.argv[1])))
json.dump({place: asdict(item) for place, item in items.items()}, sys.stdout)
"""


@pytest.fixture
def with_a_seed(tmp_path) -> Path:
    """A figures folder whose roster has one seed of the looped Sudoku model more."""
    text = (figures_folder() / "zoo.toml").read_text()
    old = 'spec = "sudoku-loop"\nseeds = [0, 1, 2, 3, 4]'
    assert text.count(old) == 1
    (tmp_path / "zoo.toml").write_text(text.replace(old, old.replace("4]", "4, 5]")))
    (tmp_path / "specs").symlink_to((figures_folder() / "specs").resolve())
    return tmp_path


def told(items: pipeline.Items) -> dict:
    return json.loads(json.dumps({place: asdict(item) for place, item in items.items()}))


def import_everything() -> None:
    for package in (loopmdm.analysis, loopmdm.model):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                import_module(module.name)


@pytest.mark.slow
def test_the_plan_does_not_depend_on_what_was_imported(with_a_seed):
    """In a fresh process, and here before and after importing all there is, with another zoo looked at first."""
    tables.load("references")
    before = told(pipeline.plan(Zoo.roster(with_a_seed)))
    import_everything()
    after = told(pipeline.plan(Zoo.roster(with_a_seed)))
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(with_a_seed)]
    fresh = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert before == after == json.loads(fresh.stdout)


def test_one_seed_more_changes_exactly_the_tables_that_take_it(with_a_seed):
    more, zoo = Zoo.roster(with_a_seed), Zoo.roster()
    assert [run.name for run in more if run not in list(zoo)] == ["sudoku-loop-seed5"]
    today, then = told(pipeline.plan(zoo)), told(pipeline.plan(more))
    assert then.keys() - today.keys() == {"run/sudoku-loop-seed5", "model/sudoku-loop-seed5"}
    changed = {place for place in today if today[place]["key"] != then[place]["key"]}
    seed = more["sudoku-loop-seed5"]
    taking = {f"table/{name}" for name, item in tables.TABLES.items() if seed in item.models.of(more)}
    assert {place for place in changed if place.startswith("table/")} == taking
    assert {"table/mask-attention", "table/sudoku-boards"} <= taking and "table/attention-heads" not in taking
    drawn = {f"figure/{figure.name}" for figure in EXHIBITS.values()
             if {f"table/{name}" for name in figure.tables} & taking}  # fmt: skip
    assert changed - taking == drawn
    assert not any(then[place]["current"] for place in taking)
    assert all(tables.is_current(name, more) == (f"table/{name}" not in taking) for name in tables.TABLES)


def not_current() -> tuple[set[str], set[str]]:
    """Names of tables: by `is_current`, and by the plan."""
    items = pipeline.plan()
    by_plan = {item.name for item in items.values() if item.kind == "table" and not item.current}
    return {name for name in tables.TABLES if not tables.is_current(name)}, by_plan


def reading(measure: str) -> set[str]:
    """Tables that ask a measure, or read one that does."""
    return with_readers({name for name, item in tables.TABLES.items() if measure in item.measures})


def with_readers(found: set[str]) -> set[str]:
    return found | {name for name, item in tables.TABLES.items() if found & set(item.tables)}


def test_everything_committed_is_current_for_the_zoo_as_it_is_alone():
    assert not_current() == (set(), set())
    assert not any(tables.is_current(name, Zoo(())) for name in tables.TABLES)


@pytest.mark.parametrize("measure", ["mask-attention-pooled", "stopping-verdicts", "excess-kl", "training-free"])
def test_a_measures_version_counts_for_the_tables_that_ask_it_alone(measure, monkeypatch):
    monkeypatch.setitem(MEASURES, measure, replace(MEASURES[measure], version=99))
    assert reading(measure) and not_current() == (reading(measure), reading(measure))


def test_a_rule_more_counts_for_the_tables_that_try_all_rules(monkeypatch):
    known = record.default_rules
    more = lambda most: [*known(most), StateDelta(max_loops=most, positions="masked", patience=2)]  # noqa: E731
    monkeypatch.setattr(record, "default_rules", more)
    stale = {"stopping-frontier", "stopping-verdicts"}
    assert not_current() == (stale, stale)


def test_what_cannot_be_measured_again_takes_its_runs_with_it(monkeypatch):
    """Runs without weights were asked before these went: for another edition they have to be trained again."""
    monkeypatch.setitem(MEASURES, "solve-rate", replace(MEASURES["solve-rate"], version=99))
    by_record, by_plan = not_current()
    assert by_record == reading("solve-rate") == {"sudoku-solve-rate", "arm-contrasts"}
    zoo = Zoo.roster()
    gone = set(zoo.select(task=("sudoku", "sudoku9"), weights=False))
    models = {item.name for item in pipeline.plan().values() if item.kind == "model" and not item.current}
    assert models == {run.name for run in gone}
    holding = {name for name, item in tables.TABLES.items() if gone & set(item.models.of(zoo))}
    assert by_plan == with_readers(by_record | holding)


def test_a_tables_own_version_and_those_it_reads_count(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "nll-by-loops", replace(tables.TABLES["nll-by-loops"], version=99))
    stale = {"nll-by-loops", "arm-contrasts", "noise-level"}
    assert not_current() == (stale, stale)


def test_another_s_max_counts_for_every_table_of_the_task():
    zoo = Zoo.roster()
    looped = zoo.select(task="tree", arm="loop")
    deeper = [replace(run, spec=replace(run.spec, model=run.spec.model | {"max_loops": 7})) for run in looped]
    other = Zoo((*(run for run in zoo if run not in looped), *deeper))
    stale = {name for name, item in tables.TABLES.items() if "tree" in {run.task for run in item.models.of(zoo)}}
    assert {name for name in tables.TABLES if not tables.is_current(name, other)} == stale


def test_every_table_says_what_it_asks():
    asked = set(itertools.chain(*(item.measures for item in tables.TABLES.values())))
    assert asked <= MEASURES.keys()
    for name, item in tables.TABLES.items():
        if name in MEASURES and MEASURES[name].on != "loops":
            assert name in item.measures
        assert eval(repr(item.models), {"select": tables.select}) == item.models
