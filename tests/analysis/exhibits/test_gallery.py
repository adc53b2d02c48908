"""The committed gallery and the generated pages are what registry and tables give; `--check` says where not."""

import json
import shutil
from pathlib import Path

import pytest

from loopmdm.analysis import exhibits as figures
from loopmdm.analysis.exhibits import gallery, pages
from loopmdm.analysis.exhibits import verdicts as claims
from loopmdm.model.errors import UsageError
from loopmdm.model.zoo.runs import Zoo

ROOT = Path(__file__).parents[3]
ONE = "sudoku-solve-rate"


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "figures" / "gallery", tmp_path / "gallery")
    return tmp_path / "gallery"


def test_committed_pages_are_not_stale():
    assert pages.stale_pages(ROOT) == []
    page = (ROOT / "figures" / "README.md").read_text()
    for name in figures.FIGURES:
        assert f"gallery/{name}.png" in page and f"loopmdm figures {name}`" in page
    table = claims.claims_table()
    results = (ROOT / "docs" / "results.md").read_text()
    assert all(f"`{name}`" in results for name in table["claim"])
    models = (ROOT / "docs" / "models.md").read_text()
    assert all(f"| `{run.file}` |" in models for run in Zoo.shipped())


def test_the_part_of_a_caption_that_is_always_shown_is_short():
    long = {
        name: len(figure.lead.split()) for name, figure in figures.FIGURES.items() if len(figure.lead.split()) > 40
    }
    assert not long
    for figure in figures.FIGURES.values():
        assert f"{figure.lead} {figure.rest}".strip() == figure.text


def test_gallery_holds_every_figure_and_no_other():
    pictures = {path.stem: path.stat().st_size for path in (ROOT / "figures" / "gallery").glob("*.png")}
    assert set(pictures) == set(figures.FIGURES)
    assert max(pictures.values()) < 200_000


def test_an_unchanged_figure_passes_and_a_changed_one_is_named(copy, tmp_path):
    out = tmp_path / "out"
    figures.FIGURES[ONE].draw(out=out)
    assert gallery.changed([ONE], out, copy) == []
    assert gallery.changed([ONE], tmp_path / "nothing", copy) == []

    picture = out / f"{ONE}.svg"
    picture.write_text(picture.read_text() + " ")
    assert gallery.changed([ONE], out, copy) == [f"{picture} differs"]
    picture.unlink()

    shutil.copy(copy / "arms.png", copy / f"{ONE}.png")
    assert "not what its tables give" in gallery.changed([ONE], out, copy)[0]


def test_other_values_and_missing_pictures_are_named(copy, tmp_path):
    path = copy / gallery.HASHES
    hashes = json.loads(path.read_text())
    hashes["tables"][ONE]["sudoku-solve-rate"] = "0"
    path.write_text(json.dumps(hashes))
    assert "other values of sudoku-solve-rate" in gallery.changed([ONE], tmp_path, copy)[0]
    (copy / f"{ONE}.png").unlink()
    assert "is missing; run `make gallery`" in gallery.changed([ONE], tmp_path, copy)[0]
    path.unlink()
    with pytest.raises(UsageError, match=r"hashes\.json is missing"):
        gallery.changed([ONE], tmp_path, copy)


def test_a_readme_without_its_marks_is_named(tmp_path):
    (tmp_path / "README.md").write_text("# nothing\n")
    with pytest.raises(UsageError, match="generated: headline"):
        pages.stale_pages(tmp_path)
