"""The roster is read as written, what contradicts itself is refused, and queries choose what they say."""

from dataclasses import replace
from pathlib import Path

import pytest

from loopmdm.model.errors import UsageError
from loopmdm.model.network import checkpoints
from loopmdm.model.network.checkpoints import list_models, list_runs
from loopmdm.model.places import figures_folder
from loopmdm.model.zoo.runs import MAIN_TASKS, Run, Zoo, select

ENTRY = "task = 'sudoku'\narm = 'loop'\n"
LOOP = f"[[run]]\n{ENTRY}spec = 'sudoku-loop'\nseeds = [0]\n"
TREE = "[[run]]\ntask = 'sudoku'\narm = 'base'\nspec = 'tree-base'\nseeds = [0]\n"


def run(task: str, arm: str, seed: int = 0, weights: bool = True) -> Run:
    """The task's first run of that name, with another seed."""
    of = Zoo.roster().first(task, arm)
    return replace(of, seed=seed, spec=of.spec.seeded(seed), weights=weights)


def names(runs) -> list[str]:
    return [found.name for found in runs]


@pytest.mark.weights
def test_all_shipped_runs_are_in_the_roster_and_have_what_it_says():
    weights = {run.name: run.weights for run in Zoo.roster()}
    for name in list_runs():
        assert weights.get(name) == (name in list_models()), name
    zoo = Zoo.shipped()
    assert set(names(zoo)) == set(list_runs())
    for shipped in zoo:
        assert shipped.record["seed"] == shipped.seed
        assert shipped.record["spec"]["model"]["max_loops"] == shipped.s_max
        assert (shipped.s_max > 1) == shipped.arm.startswith("loop")


def test_a_zoo_is_in_the_order_of_task_arm_and_seed():
    zoo = Zoo((run("sudoku", "loop", 12), run("tree", "base"), run("sudoku", "loop", 2), run("sudoku", "base", 3)))
    assert names(zoo) == ["sudoku-base-seed3", "sudoku-loop-seed2", "sudoku-loop-seed12", "tree-base"]
    assert zoo.first("sudoku").seed == 2 and zoo["tree-base"].task == "tree"
    with pytest.raises(UsageError, match="did you mean tree-base"):
        zoo["tree-bas"]
    with pytest.raises(UsageError, match="no run of arm deep on task tree"):
        zoo.first("tree", "deep")


def test_queries_choose_by_fields_and_keep_the_order_of_their_parts():
    zoo = Zoo((run("sudoku", "loop"), run("sudoku", "loop", 1, weights=False), run("sudoku", "base"),
               run("tree", "loop"), run("gsm", "loop")))  # fmt: skip
    assert select().names(zoo) == tuple(names(zoo))
    assert select(task="sudoku", arm="loop").names(zoo) == ("sudoku-loop", "sudoku-loop-seed1")
    assert select(arm="loop", weights=True, but_task="gsm").names(zoo) == ("sudoku-loop", "tree-loop")
    assert select(weights=False).names(zoo) == ("sudoku-loop-seed1",) == select(seed=1).names(zoo)
    both = select(task="tree") | select(arm=("base", "loop"), seed=0)
    assert both.names(zoo) == ("tree-loop", "gsm-loop", "sudoku-base", "sudoku-loop")
    assert select(task="sudok").of(zoo) == ()


def test_a_query_prints_as_it_is_written():
    query = select(task=MAIN_TASKS, arm="loop", seed=0) | select(weights=False, but_task="gsm")
    told = "select(task=('sudoku', 'sotu'), arm='loop', seed=0) | select(weights=False, but_task='gsm')"
    assert repr(query) == told and eval(told) == query and repr(select()) == "select()"


def test_the_axis_is_that_of_the_looped_arm():
    shallow = run("sudoku", "loop-s2")
    zoo = Zoo((run("sudoku", "loop"), run("sudoku", "base"), shallow, run("tree", "base")))
    assert {each.name: zoo.s_max(each) for each in zoo.select(task="sudoku")} == {
        "sudoku-base": 6, "sudoku-loop": 6, "sudoku-loop-s2": 2,
    }  # fmt: skip
    assert zoo.axes(zoo) == {"sudoku": 6}  # the tree's looped arm is not here
    assert zoo.s_max(zoo["tree-base"]) == 1


def test_a_base_run_may_be_shipped_before_its_looped_one(tmp_path, monkeypatch):
    """S_max is the spec's: what was not trained yet is read to it all the same."""
    monkeypatch.setattr(checkpoints, "ZOO", tmp_path)
    (tmp_path / "tree-base").mkdir()
    (tmp_path / "tree-base" / "train.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text("{}")
    zoo = Zoo.shipped()
    (shipped,) = zoo
    assert shipped.name == "tree-base" and not shipped.weights and Zoo.roster()["tree-base"].weights
    assert list_runs() == ["mine", "tree-base"]
    assert zoo.s_max(shipped) == 8 and zoo.axes(zoo) == {"tree": 8}


def test_folders_without_a_record_are_no_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "ZOO", tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "runs.py").write_text("")
    assert list_runs() == list_models() == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"lists no \[\[run\]\]"),
        ("[[run", "not TOML"),
        *((f"run = {value}", "listed as") for value in ("3", "'x'", "[1, 2]", "{a = 1}", "[[]]")),
        (f"[[run]]\n{ENTRY}spec = 'a'\nseeds = [0]\nweights = [[0]]\n", "not all among"),
        ("[[run]]\nspec = 'a'\nseeds = [0]\n", "a: needs task = a word"),
        ("[[run]]\ntask = 'sudoku'\nspec = 'a'\nseeds = [0]\n", "needs arm = a word"),
        ("[[run]]\ntask = 3.5\narm = 'loop'\nspec = 'a'\nseeds = [0]\n", "needs task .* got 3.5"),
        (f"[[run]]\n{ENTRY}spec = 'a'\n", "needs spec"),
        (f"[[run]]\n{ENTRY}spec = 'a'\nseeds = [0, 1]\nweights = [2]\n", "not all among"),
        (f"[[run]]\n{ENTRY}spec = 'a'\nseeds = [-1]\n", "at least 0"),
        (f"[[run]]\n{ENTRY}spec = 'a'\nseed = [0]\n", "did you mean seeds"),
        (f"[[run]]\n{ENTRY}spec = 'a'\nseeds = [0]\nset = 'x=1'\n", "quoted keys"),
        (f"[[run]]\n{ENTRY}spec = 'a'\nseeds = [0]\nset = {{ training.ema = 0.9 }}\n", "quoted keys"),
        (f"[[run]]\n{ENTRY}spec = 'a'\nseeds = [0]\n", "unknown spec 'a'"),
        (LOOP + LOOP, "twice"),
        (LOOP + LOOP.replace("'loop'", "'other'"), "sudoku-loop is listed twice"),
        (LOOP + TREE, "sudoku-loop is of sudoku6, but listed under task sudoku, which is tree .*another task"),
        (LOOP + LOOP.replace("'sudoku-loop'", "'sudoku-loop-s2'").replace("[0]", "[1]"), "give it another arm"),
    ],
)  # fmt: skip
def test_a_roster_that_makes_no_sense_is_refused(tmp_path, text, says):
    (tmp_path / "specs").symlink_to(Path(figures_folder() / "specs").resolve())
    (tmp_path / "zoo.toml").write_text(text)
    with pytest.raises(UsageError, match=says) as raised:
        Zoo.roster(tmp_path)
    assert "\n" not in str(raised.value).replace(str(raised.value.__cause__), "")


def test_a_missing_roster_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"zoo\.toml is missing"):
        Zoo.roster(tmp_path)


def test_a_changed_file_is_read_again(tmp_path):
    (tmp_path / "specs").mkdir()
    spec = (figures_folder() / "specs" / "sudoku-loop.toml").read_text()
    (tmp_path / "specs" / "sudoku-loop.toml").write_text(spec)
    (tmp_path / "zoo.toml").write_text(f"[[run]]\n{ENTRY}spec = 'sudoku-loop'\nseeds = [0]\n")
    first = Zoo.roster(tmp_path)
    assert Zoo.roster(tmp_path) is first and first.first("sudoku").s_max == 6
    (tmp_path / "specs" / "sudoku-loop.toml").write_text(spec.replace("max_loops = 6", "max_loops = 12"))
    assert Zoo.roster(tmp_path).first("sudoku").s_max == 12
