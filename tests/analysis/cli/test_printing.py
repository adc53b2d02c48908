"""Records on a terminal: three digits, no broken words, nothing left out without saying so."""

import sys

import pandas as pd
import pytest
import typer
from pyarrow.parquet import read_schema

from loopmdm.analysis.cli import printing
from loopmdm.analysis.cli.printing import Folded, read, show, show_frame
from loopmdm.analysis.cli.shared import app
from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.exhibits.verdicts import claims_table
from tests.commands import run

WIDTHS = [60, 80, 100, 160, 1000]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0086738, "0.00867"), (2.7954, "2.80"), (1.00005e14, "1.00e+14"), (1234.5, "1234"), (100.0, "100"),
        (0.0, "0"), (-12.345, "-12.3"), (float("nan"), "-"), (float("inf"), "inf"), (12345678, "12345678"),
        ("a\nb", "a b"),
    ],
)  # fmt: skip
def test_people_read_three_digits(value, shown):
    assert read(value) == shown


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["mask-attention", "claims", "settled"])
def test_a_table_fits_the_screen_and_says_what_is_left_out(name, width):
    frame = (claims_table() if name == "claims" else tables.load(name)).head(60)
    rows = list(frame.itertuples(index=False))
    folded = Folded.of(list(frame.columns), rows, width)
    assert sorted([*folded.columns, *folded.said, *folded.left_out]) == sorted(frame.columns)
    assert all(len(line) <= width for line in folded.lines())
    words = {word for column in folded.cells for text in column for word in text.split()}
    assert words <= {word for line in folded.lines() for word in line.split()}
    if width == 1000 and name == "settled":
        assert not folded.said and not folded.left_out and len(folded.lines()) == 62  # head and units


def test_errors_go_before_values_and_what_is_the_same_is_said_once():
    rows = [("sudoku", 0.25, 0.001, i / 7, i / 99) for i in range(3)]
    folded = Folded.of(["task", "mass", "mass_se", "log_odds", "log_odds_se"], rows, 21)
    assert (folded.columns, folded.left_out) == (["log_odds", "log_odds_se"], [])
    assert folded.said == {"task": "sudoku", "mass": "0.250", "mass_se": "0.00100"}
    rows = [("a", *[i / 9] * 4) for i in range(3)]
    folded = Folded.of(["task", "mass", "mass_se", "log_odds", "log_odds_se"], rows, 20)
    assert (folded.columns, folded.left_out) == (["mass", "log_odds"], ["mass_se", "log_odds_se"])
    assert "log_odds in nats; mass in shares of 1" in " ".join(folded.lines())


def test_one_record_that_is_too_wide_is_a_list():
    folded = Folded.of(["nelbo", "accuracy", "n_sequences"], [(0.5, 0.25, 512)], 20)
    assert folded.lines() == ["field        value", "nelbo        0.500", "accuracy     0.250", "n_sequences  512"]


def test_a_word_that_is_longer_than_the_screen_stays_whole():
    assert "x" * 50 in Folded.of(["path", "n"], [("x" * 50, 1), ("y", 2)], 20).lines()


def test_an_empty_table_is_its_head():
    assert Folded.of(["a", "b"], [], 80).lines() == ["a  b"]


def test_the_terminal_gets_the_folded_table(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    show(["model", "nelbo"], [("sudoku-loop", 0.123456)])
    assert capsys.readouterr().out == "model        nelbo\nsudoku-loop  0.123\nunits: nelbo in nats\n"


def test_a_terminal_gets_the_first_sixty_rows_of_a_measure_loops_first(capsys, monkeypatch):
    rows = [(place, pd.NA if place % 10 == 0 else place % 10, place / 7) for place in range(100)]
    frame = pd.DataFrame(rows, columns=["depth", "loop", "mass"]).astype({"loop": "Int64"})
    show_frame(frame)
    assert len(capsys.readouterr().out.splitlines()) == 101  # a pipe takes all, as they are
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    show_frame(frame)
    _, *lines, _, more = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(i) for i in range(100) if i % 10][:60]
    assert more == "... 40 more of 100 rows (a pipe takes all of them)"
    show_frame(frame.head(60))
    assert capsys.readouterr().out.splitlines()[1].split() == ["0", "-", "0"]


def test_units_are_those_of_columns_that_tables_have():
    there = {name for path in tables.tables_folder().glob("*.parquet") for name in read_schema(path).names}
    assert {name for names in printing.UNITS.values() for name in names} <= there | {
        "test_nelbo",
        "training_flops",
    }


def test_help_has_every_command_in_a_group():
    out = run(["--help"]).out
    groups = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["Options:", "Look:", "Measure:", "Train:", "Maintain:"] and out.count("...") == 1
    lines = out.partition("Look:")[2].splitlines()
    named = {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "}
    assert named == set(typer.main.get_command(app).commands)
