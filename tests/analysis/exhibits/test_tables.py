"""Tables over arms and seeds: names, means over seeds, contrasts with a known answer."""

import multiprocessing
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from loopmdm.analysis.exhibits import measuring, tables
from loopmdm.analysis.exhibits.tables import quality, training
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.quality.decomposition import nelbo_decomposition
from loopmdm.analysis.numbers import frames
from loopmdm.analysis.numbers.store import Question
from loopmdm.analysis.plots.style import band
from loopmdm.model.errors import UsageError
from loopmdm.model.training.spec import DataSpec
from loopmdm.model.zoo.runs import Zoo, select


def test_loop_counts_are_those_that_say_something():
    zoo = Zoo.shipped()
    counts = {model.name: quality.read_at(model, zoo) for model in zoo.select(task=("sudoku", "gsm"))}
    assert counts["sudoku-loop"] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18]
    assert counts["sudoku-base"] == [1, 2, 3, 4, 5, 6] and counts["sudoku-deep"] == [1]
    assert counts["gsm-loop"] == [1, 2, 3, 4, 5, 6]  # nobody learned it
    assert counts["gsm-base"] == counts["gsm-deep"] == [1]
    stored = tables.load("nll-by-loops").groupby("model")["n_loops"].unique()
    assert {name: list(stored[name]) for name in counts} == counts


@pytest.mark.slow
def test_noise_levels_are_those_of_the_same_masks(monkeypatch):
    monkeypatch.setattr(Question, "answer", lambda asked: asked.compute())
    table = quality.noise_level_table(select(task="tree", arm="loop"), Zoo.shipped())
    case = Case.of("tree-loop")
    m, test = case.m, case.test
    counts = sorted(set(table["n_loops"]))
    assert counts == [1, 2, 8, 16, 24] and test.maskable is not None
    frame = nelbo_decomposition(m.model, test.tokens, counts, n_samples=1, maskable=test.maskable)
    pd.testing.assert_frame_equal(table[frame.columns], frame)
    assert (table["n_units"] == 1000).all()


def test_arms_of_a_comparison_had_equal_training_flops():
    """Also size: base and loop are equal, and what differs in loops alone shares data and recipe."""
    zoo = Zoo.shipped()
    for task in {model.task for model in zoo}:
        records = [run.record for run in zoo.select(task=task)]
        spent = np.array([record["training_flops"]["realised"] for record in records])
        assert spent.max() / spent.min() < 1.001, task
        assert len({DataSpec(**record["spec"]["data"]) for record in records}) == 1


def test_contrasts_recover_planted_differences():
    noise = np.array([-0.1, 0.0, 0.1])
    rows = [
        {
            "model": f"sudoku-{arm}",
            "task": "sudoku",
            "arm": arm,
            "seed": seed,
            "n_loops": s,
            "max_loops": most,
            "nll": level + noise[seed],
        }
        for arm, level, most in (("base", 1.0, 1), ("loop", 0.4, 2), ("loop-isolated", 0.9, 2))
        for seed in range(3)
        for s in (1, 2)
    ]
    nll = pd.DataFrame(rows)
    nll.loc[(nll["arm"] == "loop") & (nll["n_loops"] == 1), "nll"] = 99.0  # a loop arm counts at its S_max
    nll.loc[(nll["arm"] == "base") & (nll["n_loops"] == 2), "nll"] = 99.0
    solve = nll.assign(n_clues=20, solve_rate=1 - nll["nll"])
    table = training.contrasts_table(nll, solve).set_index(["measure", "arm", "against"])
    row = table.loc[("test NELBO", "loop", "base")]
    assert row["difference"] == pytest.approx(-0.6) and row["low"] < -0.6 < row["high"] < 0
    assert table.loc[("test NELBO", "loop-isolated", "loop"), "difference"] == pytest.approx(0.5)
    assert table.loc[("one-shot", "loop", "base"), "difference"] == pytest.approx(0.6)
    assert ("test NELBO", "deep", "base") not in table.index and (table["n_seeds"] == 3).all()


@pytest.mark.slow
def test_tables_measured_in_parallel_are_the_committed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "tables_folder", lambda: tmp_path)
    names = ["references", "learning-curves"]
    assert sorted(measuring.measure_all(names, workers=2)) == sorted(names)
    for name in names:
        committed = tables.figures_folder() / "tables" / f"{name}.parquet"
        pd.testing.assert_frame_equal(tables.load(name), frames.read_table(committed))


def test_a_failing_table_ends_the_others_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "tables_folder", lambda: tmp_path / "file")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        list(measuring.measure_all(["references"], workers=1))
    deadline = time.monotonic() + 10  # the pool's own thread strikes off the list whom it saw end
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_missing_archives_are_named_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "tables_folder", lambda: tmp_path / "tables")
    with pytest.raises(UsageError, match=r"zero-shot, generative .* `loopmdm data fetch zero-shot judge`"):
        list(measuring.measure_all(["learning-curves", "zero-shot", "generative"], workers=1))
    assert not (tmp_path / "tables").exists()


def test_a_single_point_shows_its_interval():
    drawn, (one, many) = plt.subplots(1, 2)
    band(one, pd.Series([1]), pd.Series([2.0]), pd.Series([1.5]), pd.Series([3.0]), color="k")
    band(many, pd.Series([1, 2]), pd.Series([2.0, 2.0]), pd.Series([1.0, 1.0]), pd.Series([3.0, 3.0]), color="k")
    assert one.collections[0].get_segments()[0].tolist() == [[1, 1.5], [1, 3]]
    assert many.collections[0].get_paths()[0].get_extents().bounds == (1, 1, 1, 2)
    plt.close(drawn)
