"""Every registered figure draws, from committed tables, with what its caption promises."""

import json

import pandas as pd
import pytest

from loopmdm.analysis import exhibits as figures
from loopmdm.analysis.cli.figures import figures as draw
from loopmdm.analysis.cli.science import claims
from loopmdm.analysis.exhibits import gallery, registry, tables
from loopmdm.analysis.numbers import frames
from loopmdm.analysis.plots.style import LETTERS, panels_of
from loopmdm.model.errors import UsageError
from loopmdm.model.zoo.runs import Zoo


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_each_figure_is_written_whole_with_its_provenance_and_is_the_committed_picture(name, tmp_path):
    figure = figures.FIGURES[name].draw(out=tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".pdf", ".png", ".svg"]
    assert all(path.stat().st_size > 500 for path in tmp_path.iterdir())
    sidecar = json.loads((tmp_path / f"{name}.json").read_text())
    for table in figures.FIGURES[name].tables:
        assert sidecar["tables"][table] == tables.load(table).attrs["values_sha256"]
    assert sidecar["models"] and sidecar["command"] == f"loopmdm figures {name}"
    for ax in figure.axes:
        if ax.get_title():
            assert ax.lines or ax.collections or ax.containers or ax.images, ax.get_title()
    carries_what_every_figure_does(figure, figures.FIGURES[name])
    assert sidecar["alt"].startswith(f"{figures.FIGURES[name].finding}. ")
    caption = figures.FIGURES[name].text
    assert "ours" in caption or "paper" in caption
    assert gallery.against_gallery(name, tmp_path, tables.figures_folder() / "gallery") == []


def carries_what_every_figure_does(figure, exhibit):
    """The finding as title, a letter a panel, labels on the axes (or on those that a row or column share)."""
    assert " ".join(figure.get_suptitle().split()) == exhibit.finding.replace("S_max", "$\\mathbf{S_{max}}$")
    shown = panels_of(figure)
    letters = [[text.get_text() for text in ax.texts if text.get_fontweight() == "bold"] for ax in shown]
    assert letters == ([[letter] for letter in LETTERS[: len(shown)]] if len(shown) > 1 else [[]] * len(shown))
    for ax in shown:
        place = ax.get_subplotspec()
        for side, shares in (("x", "colspan"), ("y", "rowspan")):
            near = [each for each in shown if getattr(each.get_subplotspec(), shares) == getattr(place, shares)]
            assert any(getattr(each, f"get_{side}label")() for each in near), (ax.get_title(), side)
    bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert all(bar.get_ylabel() or bar.get_xlabel() for bar in bars)
    for number, ax in enumerate(figure.axes):
        shades = [image for image in ax.images if image.get_array().ndim == 2] if ax in shown else []
        assert not shades or bars, number  # a heat map without a scale


def test_a_shown_figure_carries_the_batch_figures_sidecar(tmp_path):
    item = figures.FIGURES["sudoku-solve-rate"]
    item.draw(out=tmp_path)
    shown = item.show()._repr_mimebundle_()
    batch = json.loads((tmp_path / "sudoku-solve-rate.json").read_text())
    assert shown["application/vnd.loopmdm.figure+json"] == batch
    assert (
        "data:image/png;base64," in shown["text/html"]
        and batch["tables"]["sudoku-solve-rate"][:12] in shown["text/html"]
    )


def test_pictures_are_byte_identical_between_runs(tmp_path):
    for folder in ("first", "second"):
        figures.FIGURES["sudoku-solve-rate"].draw(out=tmp_path / folder)
    for kind in ("pdf", "png", "svg"):
        files = [(tmp_path / folder / f"sudoku-solve-rate.{kind}").read_bytes() for folder in ("first", "second")]
        assert files[0] == files[1], kind


def test_each_cross_of_the_placements_stands_at_its_run():
    drawn = figures.FIGURES["placement"].draw()
    marks = {True: set(), False: set()}
    for line in drawn.axes[0].get_lines():
        marks[line.get_marker() == "x"] |= set(zip(*line.get_data(), strict=True))
    nll = tables.load("nll-by-loops")
    for _, run in nll[nll["arm"].isin(["loop-first", "loop-two", "loop-whole"])].groupby("model"):
        once, end = (run.loc[run["n_loops"] == count, "nll"].item() for count in (1, run["max_loops"].iloc[0]))
        assert {x for x, y in marks[True] if y == once} == {x for x, y in marks[False] if y == end} != set()


@pytest.mark.weights
@pytest.mark.parametrize("name", list(tables.TABLES))
def test_committed_tables_belong_to_the_shipped_models(name):
    from loopmdm.analysis.numbers.provenance import model_hashes
    from loopmdm.model.adapters.specimens import SPECIMENS

    item = tables.TABLES[name]
    models = item.models.names(Zoo.shipped())
    frame = item.read(tables.tables_folder())
    assert frame.attrs["models"] == model_hashes(models)
    others = SPECIMENS if item.reads == "specimen" else ()
    assert set(frame.get("model", models)) <= {*models, *others}
    assert tables.is_current(name)


def test_solve_rate_table_is_what_the_models_do_now():
    from loopmdm.model.network.model import LoopMDM
    from loopmdm.model.tasks.puzzles import puzzles
    from loopmdm.model.tasks.sudoku import BOARDS
    from loopmdm.model.tasks.test_sets import load_test_set, solve_one_shot

    frame = tables.load("sudoku-solve-rate")
    model = LoopMDM.from_pretrained("sudoku-loop")
    grids = load_test_set("sudoku6", 36, None).tokens
    board = BOARDS["sudoku6"]
    solved = solve_one_shot(model, board, puzzles(board, grids[:500], 20), 3)
    stored = frame[frame["model"] == "sudoku-loop"].set_index("n_loops")["solve_rate"]
    for n_loops, outcome in enumerate(solved, start=1):
        assert float(outcome.float().mean()) == pytest.approx(stored[n_loops], abs=0.003)


def test_a_missing_table_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "tables_folder", lambda: tmp_path)
    committed = frames.read_table(tables.figures_folder() / "tables" / "learning-curves.parquet")
    with pytest.warns(UserWarning, match="measuring the missing table learning-curves"):
        measured = tables.load("learning-curves")
    pd.testing.assert_frame_equal(measured, committed, check_like=False)
    assert (tmp_path / "learning-curves.parquet").exists()


def test_commands_do_not_start_to_measure_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "tables_folder", lambda: tmp_path / "tables")
    with pytest.raises(UsageError, match=r"40 minutes.*: loopmdm figures learning-curves --from checkpoints"):
        draw(["learning-curves"], "tables", tmp_path / "out", check=False)
    with pytest.raises(UsageError, match=r"and \d+ more not in .* measure it.*: loopmdm table"):
        claims()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="give --out FOLDER"):
        draw(["learning-curves"], "tables", None, check=False)
    assert list(tmp_path.iterdir()) == []


def test_what_a_wheel_measures_lies_in_the_cache_and_is_shown_while_it_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "IN_CHECKOUT", False)
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    committed = tables.load("references")
    item, zoo = tables.table("references"), Zoo.shipped()
    assert tables.stored_in(item, zoo) == tables.tables_folder()
    item.measure(tables.measured_folder())
    assert tables.stored_in(item, zoo) == tmp_path / "tables"
    frames.write_table(
        committed, tmp_path / "tables" / "references.parquet", committed.attrs | {"measures": {"x": 1}}
    )
    assert tables.stored_in(item, zoo) == tables.tables_folder()  # made by another version


@pytest.mark.parametrize(("models", "rows", "says"), [(None, 2, "which models"), (["x"], 2, "which models"),
                                                      ({}, 0, "no rows")])  # fmt: skip
def test_a_table_that_says_too_little_is_refused(models, rows, says, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "tables_folder", lambda: tmp_path)
    whole = frames.read_table(tables.figures_folder() / "tables" / "learning-curves.parquet")
    told = {} if models is None else {"models": models}
    frames.write_table(whole.head(rows), tmp_path / "learning-curves.parquet", told)
    with pytest.raises(UsageError, match=f"{says}.*loopmdm table learning-curves"):
        tables.load("learning-curves")


def test_damaged_and_outdated_tables_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    frames.write_table(pd.DataFrame({"a": [1.0, 2.0]}), path, {"models": {}})
    assert frames.read_table(path, ["a"])["a"].tolist() == [1.0, 2.0]
    with pytest.raises(UsageError, match="lacks column b"):
        frames.read_table(path, ["b"])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="loopmdm table x"):
        frames.read_table(path)
    old = pd.DataFrame({"a": [1.0]})
    old.attrs = {"schema": 0}
    old.to_parquet(path)
    with pytest.raises(UsageError, match="schema 0"):
        frames.read_table(path)
    changed = pd.DataFrame({"a": [3.0]})
    changed.attrs = {"schema": frames.SCHEMA, "values_sha256": "0"}
    changed.to_parquet(path)
    with pytest.raises(UsageError, match="recorded hash"):
        frames.read_table(path)


def test_only_a_picture_of_this_commit_and_these_tables_counts_as_drawn(monkeypatch, tmp_path):
    figure = figures.FIGURES["sudoku-solve-rate"]
    monkeypatch.setattr(registry, "commit", lambda: "0123abc")
    assert not figure.is_drawn(tmp_path)
    figure.draw(tmp_path)
    assert figure.is_drawn(tmp_path)
    sidecar, whole = tmp_path / "sudoku-solve-rate.json", (tmp_path / "sudoku-solve-rate.json").read_text()
    told = json.loads(whole)
    for damaged in ("{", "[]", json.dumps(told | {"tables": dict.fromkeys(told["tables"], "0")})):
        sidecar.write_text(damaged)
        assert not figure.is_drawn(tmp_path)
    sidecar.write_text(whole)
    for now in ("4567def", "0123abc+"):  # another commit, one with changes
        monkeypatch.setattr(registry, "commit", lambda now=now: now)
        assert not figure.is_drawn(tmp_path)
    monkeypatch.setattr(registry, "commit", lambda: "0123abc")
    (tmp_path / "sudoku-solve-rate.svg").unlink()
    assert not figure.is_drawn(tmp_path)
