"""Entries are found by what was asked, and nothing that is damaged or of another question is believed."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest

from loopmdm.analysis.exhibits.tables import quality
from loopmdm.analysis.measures import MEASURES
from loopmdm.analysis.numbers import frames
from loopmdm.analysis.numbers.store import Key, Question, Store
from loopmdm.model.files import read_json, write_json
from loopmdm.model.network.checkpoints import CONFIG, ZOO
from loopmdm.model.zoo.runs import Zoo

FRAME = pd.DataFrame({"value": [0.5, 1.5]})
KEY = Key("0" * 64, ["by sequence", [1, 2], {"n": 3}], "nll 1")


class Counted:
    """Computes, and counts how often."""

    def __init__(self, frame: pd.DataFrame = FRAME):
        self.frame, self.times = frame, 0

    def __call__(self) -> pd.DataFrame:
        self.times += 1
        return self.frame


def test_what_was_asked_is_computed_once(tmp_path):
    store, compute = Store(tmp_path), Counted()
    assert KEY not in store
    for _ in range(2):
        pd.testing.assert_frame_equal(store.get(KEY, compute), FRAME)
    assert compute.times == 1 and KEY in store and [path.name for path in tmp_path.iterdir()] == [KEY.file]


@pytest.mark.parametrize(
    "other",
    [
        Key("1" * 64, KEY.question, KEY.measure),
        Key(KEY.model, ["by sequence", [1, 2], {"n": 4}], KEY.measure),
        Key(KEY.model, KEY.question, "nll 2"),
    ],
)
def test_other_weights_questions_and_editions_are_other_entries(tmp_path, other):
    store, compute = Store(tmp_path), Counted()
    store.get(KEY, compute)
    store.get(other, compute)
    assert compute.times == 2 and other.file != KEY.file


def test_another_config_is_another_model(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(ZOO / "markov-base", folder)
    before = Key.of(str(folder), "nll 1", [])
    config = read_json(folder / CONFIG)
    write_json(folder / CONFIG, config | {"eps": 10 * config["eps"]})
    assert Key.of(str(folder), "nll 1", []) != before
    assert Key.of("markov-base", "nll 1", []) == before


def test_a_question_is_what_its_json_says():
    assert str(Key("w", [(1, 2), {"a": 1, "b": 2}], "m")) == str(Key("w", [[1, 2], {"b": 2, "a": 1}], "m"))


def test_a_damaged_entry_is_computed_again_with_one_line(tmp_path):
    store, compute = Store(tmp_path), Counted()
    store.get(KEY, compute)
    path = tmp_path / KEY.file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"is damaged; it is measured again$") as said:
        pd.testing.assert_frame_equal(store.get(KEY, compute), FRAME)
    assert len(said) == 1 and compute.times == 2
    pd.testing.assert_frame_equal(store.get(KEY, compute), FRAME)
    assert compute.times == 2


@pytest.mark.parametrize("told", [{}, {"asked": str(Key("1" * 64, KEY.question, KEY.measure))}])
def test_an_entry_of_another_question_is_not_believed(tmp_path, told):
    frames.write_table(FRAME * 2, tmp_path / KEY.file, told)
    with pytest.warns(UserWarning, match="answers another question"):
        found = Store(tmp_path).get(KEY, Counted())
    pd.testing.assert_frame_equal(found, FRAME)
    elsewhere = Store(tmp_path / "root", (tmp_path / "others",))
    frames.write_table(FRAME * 2, tmp_path / "others" / KEY.file, told)
    with pytest.warns(UserWarning, match="answers another question"):
        pd.testing.assert_frame_equal(elsewhere.get(KEY, Counted()), FRAME)


def test_what_others_have_is_taken_over(tmp_path):
    kept, cache = tmp_path / "kept", tmp_path / "cache"
    Store(cache).get(KEY, Counted())
    compute = Counted(FRAME * 2)
    pd.testing.assert_frame_equal(Store(kept, (cache,)).get(KEY, compute), FRAME)
    (cache / KEY.file).unlink()
    pd.testing.assert_frame_equal(Store(kept).get(KEY, compute), FRAME)
    assert compute.times == 0


def test_a_measures_version_is_part_of_what_was_asked(tmp_path, monkeypatch):
    item, compute = MEASURES["effective-rank"], Counted()
    for version in (1, 1, 2, 1):
        monkeypatch.setitem(MEASURES, item.name, replace(item, version=version))
        label = MEASURES[item.name].label
        Question("sudoku-base", label, [1], compute).answer(Store(tmp_path))
    assert compute.times == 2


@pytest.mark.weights
def test_everything_asked_of_runs_without_weights_is_kept_beside_them():
    zoo = Zoo.shipped()
    records = zoo.select(weights=False)
    assert len(records) > 40
    for run in records:
        for asked in (*quality.asked_over_seeds(run, zoo), *quality.asked_besides(run, zoo)):
            assert asked.key in Store.beside(run.name), (run.name, asked.asked)
            frame = frames.read_table(Store.beside(run.name).root / asked.key.file)
            assert frame.attrs["asked"] == str(asked.key)
